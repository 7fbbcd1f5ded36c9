"""What a run tells the outside: files, W&B, the terminal. None of it changes the training state."""

from pipeline.training.trackers.base import (
    CLOCK,
    ROUTINE,
    Event,
    StepMetrics,
    Tracker,
    Trackers,
    make_event,
)

__all__ = ["CLOCK", "ROUTINE", "Event", "StepMetrics", "Tracker", "Trackers", "make_event"]
