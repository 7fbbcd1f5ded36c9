"""What a run tells the outside: files, W&B, the terminal. None of it changes the training state."""

from pipeline.training.callbacks.base import (
    CLOCK,
    ROUTINE,
    Callback,
    Callbacks,
    Event,
    StepMetrics,
    make_event,
)

__all__ = ["CLOCK", "ROUTINE", "Callback", "Callbacks", "Event", "StepMetrics", "make_event"]
