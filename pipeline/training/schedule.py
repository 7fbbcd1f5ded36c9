"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up, then half a cosine down to a share of the peak."""

    warmup_steps: int = 100
    """Optimizer steps of linear warm-up."""
    final_share: float = 0.1
    """Learning rate of the last step as a share of the peak."""

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be 0 or more, got {self.warmup_steps}")
        if not 0.0 <= self.final_share <= 1.0:
            raise ValueError(f"final_share must be in [0, 1], got {self.final_share}")


def learning_rate(step: int, steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """Rate of optimizer step `step`, counted from 0, of a run of `steps`."""
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    span = max(steps - 1 - schedule.warmup_steps, 1)
    progress = min((step - schedule.warmup_steps) / span, 1.0)
    share = 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * (schedule.final_share + (1.0 - schedule.final_share) * share)
