"""The files of a run, the truth about it: steps, evals and events. All else mirrors them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.training.moments import Event, StepMetrics, Tracker
from pipeline.training.state import TrainState
from tidar_common.files import write_text_atomic
from tidar_common.jsonlines import append, whole_object
from tidar_common.run_files import DECODE_SPEED, EVENTS, METRICS


class MetricsFiles(Tracker):
    """Appends a line per step and per eval row; a resume cuts what lies after its step."""

    def __init__(self, run_dir: Path) -> None:
        self.metrics = run_dir / METRICS
        self.decode_speed = run_dir / DECODE_SPEED

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
        self.path = run_dir / EVENTS

    def on_event(self, event: Event) -> None:
        append(self.path, [event])


def cut_after(path: Path, step: int) -> None:
    """Drop the lines of steps above `step`, and what a crash left that is no row."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    kept = [line + "\n" for line in lines if (found := step_of(line)) is not None and found <= step]
    write_text_atomic(path, "".join(kept))


def step_of(line: str) -> int | None:
    """The step of a row, or None where `line` is not a whole row."""
    row = whole_object(line)
    step = row.get("step") if row is not None else None
    return step if isinstance(step, int) else None
