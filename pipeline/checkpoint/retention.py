"""Which checkpoints stay on disk."""

import math
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from tidar_common.jsonlines import read_whole
from tidar_common.run_files import DECODE_SPEED

LEFT = ".deleting-"
"""Begins the name of a folder that is to be deleted."""
EVAL_LOSS = "ar_loss"
"""Key of `evals/decode_speed.jsonl` by which `keep_best` chooses: the held-out AR loss."""


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 1000
    """Optimizer steps between checkpoints; one is always saved at the end."""
    keep_last: int = 2
    """Newest checkpoints kept; 0 keeps all."""
    keep_every: int = 0
    """Keep for good those of steps that are a multiple of this; 0 keeps none so."""
    keep_best: bool = False
    """Keep the one with the lowest held-out AR loss of those evaluated at their step."""
    asynchronous: bool = False
    """Copy the state to host memory and write it in the background."""
    on_failure: str = "stop"
    """When a save fails: stop the run, or go_on and try again when the next is due."""
    allow_changes: tuple[str, ...] = ()
    """What may differ from the run so far, such as [seed]; it is then another run."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be at least 1, got {self.every}")
        for key in ("keep_last", "keep_every"):
            if (value := getattr(self, key)) < 0:
                raise ValueError(f"{key} must be 0 or more, got {value}")
        if self.on_failure not in ("stop", "go_on"):
            raise ValueError(f"on_failure must be stop or go_on, got {self.on_failure!r}")


def step_in_name(name: str) -> int:
    """The step in a checkpoint's name, `step-00000100`; -1 where there is none."""
    number = name.removeprefix("step-")
    return int(number) if number.isdigit() else -1


def step_of(folder: Path) -> int:
    """The step of a checkpoint's folder; -1 where its name has none."""
    return step_in_name(folder.name)


def complete_checkpoints(folder: Path) -> list[Path]:
    """The published checkpoints of a run, oldest first."""
    folders = [path for path in folder.glob("step-*") if path.is_dir() and step_of(path) >= 0]
    return sorted(folders, key=step_of)


def steps_to_keep(
    steps: Collection[int], config: CheckpointConfig, losses: Mapping[int, float]
) -> set[int]:
    """Of the checkpoints at `steps`, those that stay; `losses` holds eval losses by step."""
    ordered = sorted(steps)
    if not config.keep_last:
        return set(ordered)
    kept = set(ordered[-config.keep_last :])
    if config.keep_every:
        kept |= {step for step in ordered if step % config.keep_every == 0}
    evaluated = [step for step in ordered if math.isfinite(losses.get(step, math.nan))]
    if config.keep_best and evaluated:
        kept.add(min(evaluated, key=lambda step: losses[step]))
    return kept


def eval_losses(run_dir: Path) -> dict[int, float]:
    """Held-out AR loss by step, as far as evals have been written."""
    rows = read_whole(run_dir / DECODE_SPEED)
    numbers = [(row.get("step"), row.get(EVAL_LOSS)) for row in rows]
    return {
        step: float(loss)
        for step, loss in numbers
        if isinstance(step, int) and isinstance(loss, int | float)
    }


def delete_old(folder: Path, config: CheckpointConfig) -> list[str]:
    """Delete what `config` does not keep of `folder`, a run's `checkpoints`, and what earlier
    deletions and broken saves left there; returns a line for each file that cannot be deleted."""
    by_step = {step_of(path): path for path in complete_checkpoints(folder)}
    doomed = set(by_step) - steps_to_keep(by_step, config, eval_losses(folder.parent))
    kept = [line for step in sorted(doomed) if (line := discard(by_step[step])) is not None]
    return kept + delete_left(folder)


def discard(path: Path) -> str | None:
    """Take away the name of a checkpoint's folder, for `delete_left` to delete it: a deletion that
    is cut short must not look like a damaged checkpoint. Returns why that cannot be, if so."""
    names = (path.with_name(f"{LEFT}{path.name}-{number}") for number in count())
    try:
        path.rename(next(name for name in names if not name.exists()))
    except OSError as error:
        return f"{path} cannot be deleted ({error.strerror})"
    return None


def delete_left(folder: Path) -> list[str]:
    """Delete the folders that `discard` has renamed; a line for each with a file that stays."""
    lines = []
    for path in sorted(folder.glob(f"{LEFT}*")):
        shutil.rmtree(path, ignore_errors=True)  # all but what cannot be
        try:
            if path.exists():
                shutil.rmtree(path)
        except OSError as error:
            staying = next((p for p in sorted(path.rglob("*")) if not p.is_dir()), path)
            lines.append(f"{staying} cannot be deleted ({error.strerror})")
    return lines
