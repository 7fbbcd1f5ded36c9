"""`events.jsonl`: what happened to a run besides its steps. Never cut: it is a history."""

from pathlib import Path

from pipeline.training.trackers.base import Event, Tracker
from pipeline.training.trackers.metrics import append


class EventsFile(Tracker):
    """Appends one line per event."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "events.jsonl"

    def on_event(self, event: Event) -> None:
        append(self.path, [event])
