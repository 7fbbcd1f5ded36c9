"""`tidar-status RUN_DIR`: where a run stands, from its files alone, wherever they can be seen."""

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from data_prep.cli import EXIT_BAD_INPUT, report_mistake
from data_prep.errors import UserError
from pipeline.report.read import Run, as_number, read_run
from pipeline.report.wording import compact, fixed
from pipeline.training.callbacks.progress import duration

SAVED = 75
FINAL = (0, 2, 3)
"""Exit codes of a start after which Slurm's job goes on, or is over: docs/cluster.md."""
PACE_STEPS = 50
"""Latest steps whose median gives the pace."""
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
    starts: "Starts | None" = None
    """Of its Slurm jobs; None for a run that none of them has started."""

    expected_end: float | None = None
    """Seconds since the epoch, for a run that is running."""

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
        return rows


@dataclass(frozen=True)
class Starts:
    """What `starts.jsonl`, written by slurm/restart.py, says of a run's starts."""

    count: int
    ends: tuple[dict[str, object], ...]
    running: bool
    """The last start has not recorded its end: it runs, or its node is gone."""

    def __str__(self) -> str:
        codes = [end.get("code") for end in self.ends]
        saved, final = codes.count(SAVED), sum(codes.count(code) for code in FINAL)
        kinds = {
            "saved and requeued": saved,
            "crashed": len(codes) - saved - final,
            "without a recorded end": self.count - len(codes) - self.running,
        }
        text = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
        text = f"{self.count}" + (f": {text}" if text else "")
        last = self.ends[-1] if self.ends and not self.running else {}
        if last.get("code") not in (None, 0, SAVED):
            node = f" on {last['failed_node']}" if last.get("failed_node") else ""
            text += f"; last ended with {last['code']}{node}: {last.get('why')}"
        return text


def read_starts(path: Path) -> Starts | None:
    """The record at `path`, half-written lines left out; None where there is none."""
    if not path.is_file():
        return None
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(event, dict):
            events.append(event)
    if not events:
        return None
    return Starts(
        count=sum(event.get("event") == "start" for event in events),
        ends=tuple(event for event in events if event.get("event") == "end"),
        running=events[-1].get("event") == "start",
    )


def read_status(run_dir: Path, now: float) -> Status:
    """The status at time `now` (seconds since the epoch).

    Raises:
        UserError: when `run_dir` is no run directory, or has no step yet.
    """
    run = read_run(run_dir)
    last = run.metrics[-1]
    step = int(last["step"])
    steps = run.setting("steps")
    recent = run.metrics[-PACE_STEPS:]
    seconds = [s for row in recent if (s := as_number(row.get("step_seconds"))) is not None]
    speeds = [s for row in recent if (s := as_number(row.get("tokens_per_second"))) is not None]
    pace = median(seconds) if seconds else None
    quiet = max(now - (run_dir / "metrics.jsonl").stat().st_mtime, 0.0)
    checkpoint = newest_checkpoint(run_dir / "checkpoints")
    left = pace * (steps - step) if pace is not None and isinstance(steps, int) else None
    state = state_of(run_dir, step, steps, quiet, pace)
    return Status(
        state=state,
        step=step,
        steps=steps if isinstance(steps, int) else None,
        tokens=int(as_number(last.get("tokens")) or 0),
        loss=as_number(last.get("loss")),
        tokens_per_second=median(speeds) if speeds else None,
        step_seconds=pace,
        quiet_seconds=quiet,
        seconds_left=left,
        checkpoint=checkpoint,
        checkpoint_step=int(checkpoint.rpartition("-")[2]) if checkpoint else None,
        last_eval=latest_eval(run),
        starts=read_starts(run_dir / "starts.jsonl"),
        expected_end=now - quiet + left if state == "running" and left is not None else None,
    )


def state_of(run_dir: Path, step: int, steps: object, quiet: float, pace: float | None) -> str:
    if isinstance(steps, int) and step >= steps:
        return "finished"
    if (run_dir / "interrupted").exists():
        return "stopped"
    limit = max(QUIET_AT_LEAST_S, QUIET_STEPS * (pace or 0.0))
    return "running" if quiet <= limit else "quiet"


def newest_checkpoint(folder: Path) -> str | None:
    """Name of the newest complete checkpoint: the last of the folders, which appear by a rename."""
    names = sorted(path.name for path in folder.glob("step-*") if path.is_dir())
    return names[-1] if names else None


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
        table = Table(title=str(run_dir), title_justify="left", show_header=False, box=None)
        for row in status.rows():
            table.add_row(*row)
        Console(highlight=False).print(table)
    sys.exit(found)


if __name__ == "__main__":
    main()
