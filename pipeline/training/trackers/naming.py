"""The names under which trackers show a run: the groups train, data, decode and system."""

from collections.abc import Mapping
from typing import Any

from pipeline.training.moments import StepMetrics

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
        source: {key: value for key, value in own.items() if not isinstance(value, list | dict)}
        for source, own in (row.get("by_source") or {}).items()
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
