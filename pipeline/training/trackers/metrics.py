"""The files of a run, the truth about it: steps, evals, events. All else mirrors them, under the
names that stand here: the groups train, data, decode and system.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.data.order import TrainState
from pipeline.training.moments import Event, StepMetrics, Tracker
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
    kept = [
        line + "\n" for line in lines if (number := step_of(line)) is not None and number <= step
    ]
    write_text_atomic(path, "".join(kept))


def step_of(line: str) -> int | None:
    """The step of a row, or None where `line` is not a whole row."""
    row = whole_object(line)
    step = row.get("step") if row is not None else None
    return step if isinstance(step, int) else None


AXES = ("step", "tokens")
"""Stand in every row, so that each panel can be drawn over steps or over clean tokens."""
GROUPS = {
    "sequences_seen": "data",
    "data_digest": "data",
    "data_wait_seconds": "data",
    "tokens_per_second": "system",
    "step_seconds": "system",
    "model_tflops": "system",
    "mfu": "system",
    "peak_memory_bytes": "system",
}
"""Group of a key of `metrics.jsonl`; all others are of training."""


def step_values(metrics: StepMetrics) -> dict[str, Any]:
    """A step's numbers by group, those that are there, and the axes."""
    row = metrics.to_dict()
    values = {axis: row[axis] for axis in AXES}
    for key, value in row.items():
        if key not in AXES and value is not None:
            values[f"{GROUPS.get(key, 'train')}/{key}"] = value
    return values


def eval_values(row: Mapping[str, Any]) -> dict[str, Any]:
    """An eval row's numbers under `decode/<method>/temperature_<t>/…`. Of each source of the text
    only single numbers: its lists, position by position, would be most of all."""
    singles = {
        source: {key: value for key, value in numbers.items() if not isinstance(value, list | dict)}
        for source, numbers in (row.get("by_source") or {}).items()
    }
    prefix = f"decode/{row['method']}/temperature_{row['temperature']:g}"
    return dict(flatten(prefix, {**row, "by_source": singles}))


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
