"""`tidar-train`: prepared shards to a trained model. `torchrun … -m pipeline.train` for several."""

import sys

from omegaconf import DictConfig

from data_prep.cli import report_mistake, run
from data_prep.errors import UserError
from pipeline.sweep import FLAGS, run_sweep
from pipeline.training.distributed import joined_world
from pipeline.training.loop import TrainingStoppedError
from pipeline.training.settings import TrainSettings
from pipeline.training.setup import build_trainer, write_config
from pipeline.training.signals import EXIT_SAVED, code_for_launcher, stop_on_signal

INTERRUPTED = "interrupted"
"""File in the run directory that says: stopped by a signal, saved, to be continued."""
EXIT_STOPPED = 3
"""Exit code of a run that cannot go on as it is."""


def train(cfg: DictConfig) -> int:
    settings = TrainSettings.from_config(cfg)
    with joined_world() as world, stop_on_signal() as stop:

        def say(text: str) -> None:
            if world.is_main:
                print(text, flush=True)

        if world.is_main:
            prepare_run_dir(settings)
        trainer = build_trainer(settings, world, say)
        try:
            finished = trainer.run(stop)
        except TrainingStoppedError as error:
            if world.is_main:
                report_mistake(str(error))
            return EXIT_STOPPED
        if finished:
            say(f"done: {settings.run_dir} has {trainer.state.step} steps, see report.html there")
            return 0
        if world.is_main:
            (settings.run_dir / INTERRUPTED).touch()
        say(
            f"stopped ({stop.name or 'another rank was asked to'}) after step {trainer.state.step} "
            "and saved; the same command continues"
        )
        return EXIT_SAVED


def prepare_run_dir(settings: TrainSettings) -> None:
    """Create the run directory with its config; raises UserError where that cannot be done."""
    try:
        settings.run_dir.mkdir(parents=True, exist_ok=True)
        (settings.run_dir / INTERRUPTED).unlink(missing_ok=True)
        write_config(settings.run_dir, settings)
    except OSError as error:
        raise UserError(f"run_dir: {settings.run_dir} cannot be written ({error})") from error


def main() -> None:
    if any(flag in sys.argv for flag in FLAGS):
        sys.exit(run_sweep([word for word in sys.argv[1:] if word not in FLAGS]))
    sys.exit(code_for_launcher(run("train", train)))


if __name__ == "__main__":
    main()
