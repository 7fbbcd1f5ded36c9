"""What a run tells the outside: files, W&B, the terminal. None of it changes the training state."""

from pipeline.training.callbacks.base import Callback, Callbacks, StepMetrics

__all__ = ["Callback", "Callbacks", "StepMetrics"]
