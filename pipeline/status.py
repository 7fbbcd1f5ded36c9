"""`tidar-status RUN_DIR`: where a run or a sweep stands, its report, and how runs differ; from
their files alone, wherever those can be seen."""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from pipeline.report.compare import compare, describe, draw
from pipeline.report.page import build_report
from pipeline.report.read import Run, as_number, read_run
from pipeline.report.standing import (
    PACE_STEPS,
    Starts,
    pace_of,
    ran_as,
    read_starts,
    skipped_shards,
)
from tidar_common.cli import report_mistake, telling_mistakes
from tidar_common.errors import UserError
from tidar_common.run_files import CONFIG, INTERRUPTED, METRICS, REPORT, Exit, newest_checkpoint
from tidar_common.tables import MISSING, Table, compact, duration, fixed

QUIET_STEPS = 20
"""A run that has written nothing for so many steps' time is called quiet, not running."""
QUIET_AT_LEAST_S = 300.0
"""An eval or a checkpoint may take this long."""
PLACES = (("report", REPORT), ("W&B", "wandb"), ("logs", "logs"))
"""What a reader may want to open next, named where a run has it."""
EVAL = {
    "step": "step",
    "tokens per forward": "tokens_per_forward",
    "x the speed of AR": "speedup_over_ar",
    "held-out AR loss": "ar_loss",
}
"""What is shown of the latest eval, and the keys of its row."""


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
    environment: str | None = None
    """What the newest start ran as."""
    places: tuple[tuple[str, str], ...] = ()
    """Name and path of what there is to open."""

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
        if self.environment is not None:
            rows.append(("ran as", self.environment))
        return [*rows, *self.places]


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
    quiet = max(now - (run_dir / METRICS).stat().st_mtime, 0.0)
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
        environment=ran_as(run_dir),
        places=tuple((name, str(run_dir / at)) for name, at in PLACES if (run_dir / at).exists()),
        expected_end=now - quiet + left if state == "running" and left is not None else None,
    )


def state_of(run_dir: Path, step: int, steps: object, quiet: float, pace: float | None) -> str:
    if isinstance(steps, int) and step >= steps:
        return "finished"
    if (run_dir / INTERRUPTED).exists():
        return "stopped"
    limit = max(QUIET_AT_LEAST_S, QUIET_STEPS * (pace or 0.0))
    return "running" if quiet <= limit else "quiet"


def latest_eval(run: Run) -> dict[str, float | None] | None:
    row = run.last_eval("tidar", 0.0) or run.last_eval("ar", 0.0) if run.evals else None
    if row is None:
        return None
    return {shown: as_number(row.get(name)) for shown, name in EVAL.items()}


def runs_below(folder: Path) -> list[Path]:
    """The runs of a sweep, each a folder of its own; none where `folder` is a run itself."""
    if (folder / METRICS).is_file() or not folder.is_dir():
        return []
    return sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))


def sweep_table(runs: list[Path], now: float) -> Table:
    """A line for each run; one without a step yet has no more than its name."""
    rows = []
    for run_dir in runs:
        try:
            status = read_status(run_dir, now)
        except UserError:
            rows.append([run_dir.name, "no step yet"])
            continue
        evaluated = status.last_eval or {}
        rows.append([
            run_dir.name, status.state, f"{status.step:,}", fixed(status.loss, 3),
            *(fixed(evaluated.get(name), 3) for name in list(EVAL)[1:]),
            compact(status.tokens_per_second), status.checkpoint or MISSING,
        ])  # fmt: skip
    head = ("run", "state", "step", "loss", *list(EVAL)[1:], "tokens/s", "checkpoint")
    return Table(head, rows, left=(0, 1))


def show(folder: Path, now: float) -> str:
    """A run's status, or the table of a sweep's runs, under its path."""
    if runs := runs_below(folder):
        return f"{folder}\n{sweep_table(runs, now).text('  ')}"
    return f"{folder}\n{Table((), read_status(folder, now).rows(), left=(0, 1)).text('  ')}"


def compare_runs(first: Path, others: list[Path], asked: argparse.Namespace) -> Exit:
    """Print how each of `others` differs from the first run; whether all are equal or near."""
    if not others or (asked.plot is not None and len(others) > 1):
        count = "two runs or more" if not others else "two runs for --plot"
        raise UserError(f"--compare: give {count}, the first to compare with")
    equal = True
    for other in others:
        comparison = compare(first, other, asked.key)
        print(f"{first} and {other}", describe(comparison, asked.key), sep="\n")
        equal = equal and (comparison.equal or comparison.near(asked.tolerance))
        if asked.plot is not None:
            draw(comparison, asked.key, asked.plot, f"{first} and {other}")
    return Exit.DONE if equal else Exit.FAULT


def parser() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser(
        prog="tidar-status",
        description=__doc__,
        epilog="Exit codes: 0 done, 1 runs that are compared differ, 2 a mistake in the input.",
    )
    add = words.add_argument
    add("run_dir", type=Path, nargs="+", help="a training run's directory, or that of a sweep's")
    action = words.add_mutually_exclusive_group()
    action.add_argument("--report", action="store_true", help="draw report.html, print its path")
    action.add_argument("--table", action="store_true", help="a line for each run")
    action.add_argument("--compare", action="store_true", help="where runs differ from the first")
    add("--key", default="loss", help="compared key of metrics.jsonl (default loss)")
    add("--plot", type=Path, help="write the compared differences as a page (HTML) here")
    help_tolerance = "largest relative difference that counts as equal (default 0: bit for bit)"
    add("--tolerance", type=float, default=0.0, help=help_tolerance)
    return words


@telling_mistakes
def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code; a run that cannot be read does not hide the others."""
    asked = parser().parse_args(arguments)
    if asked.compare:
        return compare_runs(asked.run_dir[0], asked.run_dir[1:], asked)
    if asked.table:
        print(sweep_table(asked.run_dir, time.time()).text())
        return Exit.DONE
    code = Exit.DONE
    for run_dir in asked.run_dir:
        try:
            print(build_report(run_dir) if asked.report else show(run_dir, time.time()))
        except UserError as error:
            report_mistake(str(error))
            code = Exit.BAD_INPUT
    return code


if __name__ == "__main__":
    sys.exit(main())
