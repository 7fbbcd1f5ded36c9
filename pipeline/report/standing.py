"""Where a run stands, from its files alone: its starts, its newest checkpoint, its pace."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from pipeline.report.read import Run, as_number
from tidar_common.jsonlines import read_whole, whole_object
from tidar_common.run_files import (
    ENVIRONMENT,
    EVENTS,
    FINAL,
    SKIPPED_SHARDS,
    STARTS,
    Exit,
)
from tidar_common.tables import MISSING, Table, compact, fixed

PACE_STEPS = 50
"""Latest steps whose median gives the pace."""
MOST_STARTS = 50
"""Newest starts that the page lists."""
MOST_SHARDS = 3
"""Skipped shards that are named; of more the number is given."""

Event = Mapping[str, Any]


@dataclass(frozen=True)
class Starts:
    """What `starts.jsonl`, written by slurm/restart.py, says of a run's starts."""

    count: int
    ends: tuple[Event, ...]
    running: bool
    """The last start has not recorded its end: it runs, or its node is gone."""
    events: tuple[Event, ...] = ()
    """All of the record, in order; empty for a run outside of Slurm."""

    def __str__(self) -> str:
        codes = [end.get("code") for end in self.ends]
        saved, final = codes.count(Exit.SAVED), sum(codes.count(code) for code in FINAL)
        kinds = {
            "saved and requeued": saved,
            "crashed": len(codes) - saved - final,
            "without a recorded end": self.count - len(codes) - self.running,
        }
        text = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
        text = f"{self.count}" + (f": {text}" if text and self.events else "")
        last = self.ends[-1] if self.ends and not self.running else {}
        if last.get("code") not in (None, Exit.DONE, Exit.SAVED):
            node = f" on {last['failed_node']}" if last.get("failed_node") else ""
            text += f"; last ended with {last['code']}{node}: {last.get('why')}"
        return text

    def pairs(self) -> list[tuple[Event, Event | None]]:
        """Each start with its end, None where none was recorded."""
        starts: list[tuple[Event, Event | None]] = []
        for event in self.events:
            if event.get("event") == "start":
                starts.append((event, None))
            elif starts and starts[-1][1] is None:
                starts[-1] = (starts[-1][0], event)
        return starts


def read_starts(run_dir: Path) -> Starts | None:
    """The starts of a run: of its Slurm jobs, else those of `events.jsonl`; None without either.

    Half-written lines are left out.
    """
    events = read_whole(run_dir / STARTS)
    if events:
        return Starts(
            count=sum(event.get("event") == "start" for event in events),
            ends=tuple(event for event in events if event.get("event") == "end"),
            running=events[-1].get("event") == "start",
            events=tuple(events),
        )
    started = [e for e in read_whole(run_dir / EVENTS) if e.get("event") == "started"]
    return Starts(count=len(started), ends=(), running=True) if started else None


def ran_as(run_dir: Path) -> str | None:
    """What the newest start ran as, in a line; None where nothing says.

    Of `environment.json`, whatever it holds, what can be read.
    """
    path = run_dir / ENVIRONMENT
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    environment = whole_object(text) or {}
    parts = []
    if commit := environment.get("git_commit"):
        changed = ", changed" if environment.get("git_changed") else ""
        parts.append(f"commit {str(commit)[:10]}{changed}")
    packages = environment.get("packages")
    if isinstance(packages, Mapping):
        known = [name for name in ("torch", "deepspeed") if packages.get(name)]
        parts += [f"{name} {packages[name]}" for name in known]
    devices, hosts = environment.get("devices"), environment.get("hosts")
    if isinstance(devices, Mapping) and isinstance(hosts, Mapping):
        shown = " and ".join(f"{count} x {name}" for name, count in devices.items())
        parts.append(f"{shown} on {len(hosts)} host{'s' if len(hosts) != 1 else ''}")
    return ", ".join(parts) or None


def skipped_shards(run_dir: Path) -> str | None:
    """The damaged shards that the run went on without, in words; None where there are none."""
    shards = read_whole(run_dir / SKIPPED_SHARDS)
    if not shards:
        return None
    names = [
        f"{row['set']}: {row.get('shard')}" if row.get("set") else str(row.get("shard"))
        for row in shards[:MOST_SHARDS]
    ]
    more = ", …" if len(shards) > MOST_SHARDS else ""
    return f"{len(shards):,} damaged, left out: {', '.join(names)}{more}"


def pace_of(run: Run, name: str) -> float | None:
    """Median of a column of the latest steps."""
    recent = (as_number(row.get(name)) for row in run.metrics[-PACE_STEPS:])
    values = [value for value in recent if value is not None]
    return median(values) if values else None


def standing_tables(
    run: Run,
    starts: Starts | None,
    checkpoint: str | None,
    updated: float | None,
    skipped: str | None = None,
    environment: str | None = None,
) -> list[Table]:
    """Step, pace, checkpoint and what is left, and a table with one line for each start.

    `checkpoint` names the newest one; `updated` is when the last step was recorded, in seconds
    since the epoch; `skipped` is what `skipped_shards` says, `environment` what `ran_as` does.
    """
    step, steps = int(run.metrics[-1]["step"]), run.setting("steps")
    pace = pace_of(run, "step_seconds")
    known = isinstance(steps, int) and steps > step and pace is not None
    left = (steps - step) * pace if known else None
    ends = None if left is None or updated is None else moment(updated + left)
    rows = [
        ["step", f"{step:,} of {steps:,}" if isinstance(steps, int) else f"{step:,}"],
        ["speed", f"{compact(pace_of(run, 'tokens_per_second'))} tokens/s, {fixed(pace)} s a step"],
        ["last checkpoint", checkpoint or "none yet"],
        ["training left at this pace", MISSING if left is None else span(left)],
        ["expected end", MISSING if ends is None else f"{ends}, without another stop"],
        ["starts", str(starts) if starts else MISSING],
        *([["shards", skipped]] if skipped is not None else []),
        *([["ran as", environment]] if environment is not None else []),
    ]
    tables = [Table((), rows, left=(0, 1))]
    if starts and (pairs := starts.pairs()):
        head = ("start", "job", "nodes", "began", "lasted", "ended with", "checkpoint", "")
        numbered = list(enumerate(pairs, 1))[-MOST_STARTS:]
        cells = [_start_cells(number, *pair) for number, pair in numbered]
        tables.append(Table(head, cells, left=range(len(head))))
    return tables


def _start_cells(number: int, start: Event, end: Event | None) -> list[str]:
    began = as_number(start.get("time"))
    ended = as_number(end.get("time")) if end else None
    node = f" (first on {end['failed_node']})" if end and end.get("failed_node") else ""
    return [
        f"{number}",
        f"{start.get('job')}, start {start.get('start')}",
        str(start.get("nodes")),
        moment(began) if began else MISSING,
        span(ended - began) if began and ended else MISSING,
        str(end.get("code")) if end else "no end recorded",
        str(end.get("checkpoint") or MISSING) if end else MISSING,
        f"{end.get('why')}{node}" if end else "",
    ]


def moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def span(seconds: float) -> str:
    """`3 d 4 h`, `2 h 10 min`, `12 min 5 s`: the two largest units."""
    for size, unit, below, small in (
        (86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"),
    ):  # fmt: skip
        if seconds >= size:
            return f"{int(seconds // size)} {unit} {int(seconds % size // below)} {small}"
    return f"{seconds:.0f} s"
