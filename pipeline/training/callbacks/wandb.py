"""The same numbers in Weights & Biases. W&B never stops a run: when it fails, it says so once."""

import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.training.callbacks.base import Callback, StepMetrics
from pipeline.training.state import TrainState

MODES = ("offline", "online", "disabled")


@dataclass(frozen=True)
class WandbConfig:
    mode: str = "offline"
    """`online`, `disabled`, or `offline`: to run_dir/wandb, for `wandb sync` to upload later."""
    project: str = "tidar"
    entity: str | None = None
    name: str | None = None
    """Name of the run; None takes the run directory's."""
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")


class Wandb(Callback):
    """Mirrors steps and evals; a continued run continues the same W&B run."""

    def __init__(
        self,
        run_dir: Path,
        config: WandbConfig,
        resolved: dict[str, Any],
        say: Callable[[str], None],
    ) -> None:
        self.run_dir = run_dir
        self.config = config
        self.resolved = resolved
        self.say = say
        self.run: Any = None

    def on_start(self, state: TrainState) -> None:
        if self.config.mode != "disabled":
            self._guard("start", self._start)

    def on_step(self, metrics: StepMetrics) -> None:
        values = {f"train/{k}": v for k, v in metrics.to_dict().items() if v is not None}
        self._log(metrics.step, values)

    def on_eval(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            prefix = f"decode_speed/{row['method']}/temperature_{row['temperature']:g}"
            self._log(row["step"], dict(flatten(prefix, row)))

    def on_end(self, state: TrainState, finished: bool) -> None:
        run = self.run
        if run is not None:
            self._guard("finish", run.finish)

    def _start(self) -> None:
        import wandb

        folder = self.run_dir / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(
            id=run_id(folder),
            resume="allow",
            mode=self.config.mode,  # type: ignore[arg-type]
            dir=str(self.run_dir),
            project=self.config.project,
            entity=self.config.entity,
            name=self.config.name or self.run_dir.name,
            tags=list(self.config.tags),
            config=self.resolved,
            settings=wandb.Settings(silent=True, console="off"),
        )

    def _log(self, step: int, values: dict[str, Any]) -> None:
        run = self.run
        if run is not None:
            self._guard("log", lambda: run.log(values, step=step))

    def _guard(self, what: str, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:
            self.run = None
            self.say(
                f"warning: W&B could not {what} ({error}); training goes on without it, "
                "metrics.jsonl has all numbers"
            )


def run_id(folder: Path) -> str:
    """The W&B id of a run directory, made at its first start and kept in `wandb/run_id`."""
    path = folder / "run_id"
    if not path.exists():
        temporary = folder / f"run_id.{os.getpid()}"
        temporary.write_text(uuid.uuid4().hex[:12] + "\n")
        os.replace(temporary, path)
    return path.read_text().strip()


def flatten(prefix: str, row: dict[str, Any]) -> list[tuple[str, Any]]:
    """Numbers of an eval row under slash-separated names; lists by position, counted from 1."""
    items: list[tuple[str, Any]] = []
    for key, value in row.items():
        if isinstance(value, list):
            items += [
                (f"{prefix}/{key}/{position}", entry)
                for position, entry in enumerate(value, 1)
                if entry is not None
            ]
        elif isinstance(value, dict):
            items += flatten(f"{prefix}/{key}", value)
        elif isinstance(value, int | float) and key not in ("step", "temperature"):
            items.append((f"{prefix}/{key}", value))
    return items
