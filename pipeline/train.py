"""`tidar-train`: prepared shards to a trained model. `torchrun … -m pipeline.train` for several."""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from pipeline.training.launch.signals import (
    StopRequest,
    code_for_launcher,
    deadline,
    stop_on_signal,
)
from tidar_common.cli import report_mistake, run, telling_mistakes
from tidar_common.progress import doing
from tidar_common.run_files import INTERRUPTED, Exit
from tidar_common.sweep import FLAGS, expand, train_each

# What needs torch is imported where training begins: no help or mistake in a key waits for it.
if TYPE_CHECKING:
    from pipeline.distributed import World
    from pipeline.training.settings import TrainSettings


def train(cfg: DictConfig) -> int:
    doing.tell = partial(print, flush=True)  # on stderr a mistake stays the only line
    doing("loading torch and DeepSpeed")
    from pipeline.distributed import LostProcessError, joined_world, make_deterministic
    from pipeline.training.launch.run_dir import StillHeldError, owned
    from pipeline.training.settings import TrainSettings

    settings = TrainSettings.from_config(cfg)
    ends = deadline(settings.stop_before, settings.stop_margin_s)
    try:
        with joined_world() as world, stop_on_signal(ends) as stop:

            def say(text: str) -> None:
                if world.is_main:
                    doing.spoke()
                    print(text, flush=True)

            doing.tell = say
            if settings.deterministic:
                make_deterministic(say)
            with owned(settings.run_dir, settings.resolved, world, say):
                return train_in_world(settings, world, stop, say)
    except LostProcessError as error:
        report_mistake(f"{error}; the last checkpoint is intact, and the same command continues")
        return Exit.LOST
    except StillHeldError as error:
        report_mistake(f"{error}; end it, and the same command continues")
        return Exit.LOST


def train_in_world(
    settings: "TrainSettings", world: "World", stop: StopRequest, say: Callable[[str], None]
) -> int:
    """Build the trainer and run it; returns the exit code."""
    from pipeline.training.guards.watchdog import Watchdog
    from pipeline.training.moments import TrainingStoppedError
    from pipeline.training.setup import build_trainer
    from pipeline.training.trackers.progress import describe_end

    try:
        with Watchdog(settings.run_dir, world.rank, settings.watch) as watchdog:
            trainer = build_trainer(settings, world, watchdog, say)
            finished = trainer.run(stop)
    except TrainingStoppedError as error:
        if world.is_main:
            report_mistake(str(error))
        return Exit.STOPPED
    if finished:
        say(describe_end(settings, trainer.state.step))
        return Exit.DONE
    if world.is_main:
        (settings.run_dir / INTERRUPTED).touch()
    say(
        f"stopped ({stop.name or 'another rank was asked to'}) after step {trainer.state.step} "
        "and saved; the same command continues"
    )
    return Exit.SAVED


@telling_mistakes
def train_sweep(overrides: list[str]) -> int:
    """Train the runs of a sweep, print where they stand; returns the first code that is not 0."""
    code = train_each(overrides)
    if len(runs := expand(overrides)) > 1:
        folders = [Path(run[-1].partition("=")[2]).expanduser() for run in runs]
        command = [sys.executable, "-m", "pipeline.status", "--table", *map(str, folders)]
        subprocess.run(command, check=False)
    return code


def main() -> None:
    if any(flag in sys.argv for flag in FLAGS):
        sys.exit(train_sweep([word for word in sys.argv[1:] if word not in FLAGS]))
    sys.exit(code_for_launcher(run("train", train)))


if __name__ == "__main__":
    main()
