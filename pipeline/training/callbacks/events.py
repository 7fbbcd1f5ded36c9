"""`events.jsonl`: what happened to a run besides its steps. Never cut: it is a history."""

from pathlib import Path

from pipeline.training.callbacks.base import Callback, Event
from pipeline.training.callbacks.metrics import append


class EventsFile(Callback):
    """Appends one line per event."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "events.jsonl"

    def on_event(self, event: Event) -> None:
        append(self.path, [event])
