"""The files of a run, the truth about it: steps, evals and events. All else mirrors them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.training.moments import Event, StepMetrics, Tracker
from pipeline.training.state import TrainState
from tidar_common.files import write_text_atomic


class MetricsFiles(Tracker):
    """Appends a line per step and per eval row; a resume cuts what lies after its step."""

    def __init__(self, run_dir: Path) -> None:
        self.metrics = run_dir / "metrics.jsonl"
        self.decode_speed = run_dir / "evals" / "decode_speed.jsonl"

    def on_start(self, state: TrainState) -> None:
        for path in (self.metrics, self.decode_speed):
            path.parent.mkdir(parents=True, exist_ok=True)
        self.on_rollback(state)

    def on_rollback(self, state: TrainState) -> None:
        for path in (self.metrics, self.decode_speed):
            cut_after(path, state.step)

    def on_step(self, metrics: StepMetrics) -> None:
        append(self.metrics, [metrics.to_dict()])

    def on_eval(self, rows: Sequence[Mapping[str, Any]]) -> None:
        append(self.decode_speed, rows)


class EventsFile(Tracker):
    """`events.jsonl`: what happened to a run besides its steps. Never cut: it is a history."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "events.jsonl"

    def on_event(self, event: Event) -> None:
        append(self.path, [event])


def append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add one JSON line per row, in a single write."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def cut_after(path: Path, step: int) -> None:
    """Drop the lines of steps above `step`, and what a crash left that is no row."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    kept = [line + "\n" for line in lines if (found := step_of(line)) is not None and found <= step]
    write_text_atomic(path, "".join(kept))


def step_of(line: str) -> int | None:
    """The step of a row, or None where `line` is not a whole row."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return step if isinstance(step, int) else None
