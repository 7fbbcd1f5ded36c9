"""`tidar-status RUN_DIR`: where a run stands, from its files alone, wherever they can be seen."""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from pipeline.report.read import Run, as_number, read_run
from pipeline.report.standing import (
    PACE_STEPS,
    Starts,
    pace_of,
    read_starts,
    skipped_shards,
)
from pipeline.training.trackers.progress import duration
from tidar_common.cli import EXIT_BAD_INPUT, report_mistake
from tidar_common.errors import UserError
from tidar_common.run_files import newest_checkpoint
from tidar_common.tables import Table, compact, fixed

QUIET_STEPS = 20
"""A run that has written nothing for so many steps' time is called quiet, not running."""
QUIET_AT_LEAST_S = 300.0
"""An eval or a checkpoint may take this long."""


@dataclass(frozen=True)
class Status:
    """What the files of a run say at one moment."""

    state: str
    """`finished`, `stopped` (saved, to be continued), `running`, or `quiet` (nothing written for
    long: crashed, killed, waiting in a queue, or hanging)."""
    step: int
    steps: int | None
    """None where the config cannot be read."""
    tokens: int
    loss: float | None
    tokens_per_second: float | None
    step_seconds: float | None
    quiet_seconds: float
    """Since the last step was recorded."""
    seconds_left: float | None
    """At the latest pace, evals and checkpoints not counted."""
    checkpoint: str | None
    checkpoint_step: int | None
    """The newest complete one, which a restart continues from."""
    last_eval: dict[str, float | None] | None
    starts: Starts | None = None
    """Of its Slurm jobs or, without one, by its events; None where nothing says."""

    expected_end: float | None = None
    """Seconds since the epoch, for a run that is running."""
    skipped_shards: str | None = None
    """The damaged shards that the run went on without, in words."""

    def rows(self) -> list[tuple[str, str]]:
        """Name and value of each line."""
        of = f" of {self.steps:,}" if self.steps else ""
        rows = [
            ("state", self.state),
            ("step", f"{self.step:,}{of}"),
            ("clean tokens", compact(self.tokens)),
            ("loss", fixed(self.loss, 3)),
            ("speed", f"{compact(self.tokens_per_second)} tokens/s, {fixed(self.step_seconds)} s "
                      f"a step (median of the last {PACE_STEPS})"),
            ("last step", f"{duration(self.quiet_seconds)} ago"),
        ]  # fmt: skip
        if self.checkpoint_step is None:
            rows.append(("checkpoint", "none yet"))
        else:
            behind = self.step - self.checkpoint_step
            rows.append(("checkpoint", f"{self.checkpoint}, {behind:,} steps behind"))
        if self.last_eval:
            step, *others = self.last_eval.items()
            shown = ", ".join(f"{fixed(value)} {name}" for name, value in others)
            rows.append(("last eval", f"step {step[1]:,.0f}: {shown}"))
        if self.seconds_left is not None and self.state in ("running", "quiet"):
            rows.append(("time left", f"{duration(self.seconds_left)} of training"))
        if self.expected_end is not None:
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.expected_end))
            rows.append(("expected end", f"{when}, without another stop"))
        if self.starts is not None:
            rows.append(("starts", str(self.starts)))
        if self.skipped_shards is not None:
            rows.append(("shards", self.skipped_shards))
        return rows


def read_status(run_dir: Path, now: float) -> Status:
    """The status at time `now` (seconds since the epoch).

    Raises:
        UserError: when `run_dir` is no run directory, or has no step yet.
    """
    run = read_run(run_dir)
    last = run.metrics[-1]
    step = int(last["step"])
    steps = run.setting("steps")
    pace = pace_of(run, "step_seconds")
    quiet = max(now - (run_dir / "metrics.jsonl").stat().st_mtime, 0.0)
    checkpoint = newest_checkpoint(run_dir)
    left = pace * (steps - step) if pace is not None and isinstance(steps, int) else None
    state = state_of(run_dir, step, steps, quiet, pace)
    return Status(
        state=state,
        step=step,
        steps=steps if isinstance(steps, int) else None,
        tokens=int(as_number(last.get("tokens")) or 0),
        loss=as_number(last.get("loss")),
        tokens_per_second=pace_of(run, "tokens_per_second"),
        step_seconds=pace,
        quiet_seconds=quiet,
        seconds_left=left,
        checkpoint=checkpoint,
        checkpoint_step=int(checkpoint.rpartition("-")[2]) if checkpoint else None,
        last_eval=latest_eval(run),
        starts=read_starts(run_dir),
        skipped_shards=skipped_shards(run_dir),
        expected_end=now - quiet + left if state == "running" and left is not None else None,
    )


def state_of(run_dir: Path, step: int, steps: object, quiet: float, pace: float | None) -> str:
    if isinstance(steps, int) and step >= steps:
        return "finished"
    if (run_dir / "interrupted").exists():
        return "stopped"
    limit = max(QUIET_AT_LEAST_S, QUIET_STEPS * (pace or 0.0))
    return "running" if quiet <= limit else "quiet"


def latest_eval(run: Run) -> dict[str, float | None] | None:
    row = run.last_eval("tidar", 0.0) or run.last_eval("ar", 0.0) if run.evals else None
    if row is None:
        return None
    names = {
        "step": "step",
        "tokens per forward": "tokens_per_forward",
        "x the speed of AR": "speedup_over_ar",
        "held-out AR loss": "ar_loss",
    }
    return {shown: as_number(row.get(name)) for shown, name in names.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="tidar-status", description=__doc__)
    parser.add_argument("run_dir", type=Path, nargs="+", help="a training run's directory")
    found = 0
    for run_dir in parser.parse_args(arguments).run_dir:
        try:
            status = read_status(run_dir, time.time())
        except UserError as error:
            report_mistake(str(error))
            found = EXIT_BAD_INPUT
            continue
        print(run_dir, Table((), status.rows(), left=(0, 1)).text("  "), sep="\n")
    sys.exit(found)


if __name__ == "__main__":
    main()
