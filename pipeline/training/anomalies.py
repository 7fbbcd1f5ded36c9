"""Steps that went wrong: not finite, or far outside of what came before."""

import statistics
from collections import deque
from dataclasses import dataclass

MAD_TO_SIGMA = 1.4826
"""Median absolute deviation times this estimates the standard deviation of a normal sample."""
FEWEST = 16
"""Values before a score means anything."""


@dataclass(frozen=True)
class AnomalyConfig:
    max_skipped_in_a_row: int = 5
    """Steps with a non-finite loss or gradient in a row that are skipped; one more ends the run."""
    spike_score: float = 0.0
    """Report a loss or gradient norm whose robust z-score is above this; 0 reports none."""
    spike_window: int = 128
    """Steps that a score looks back on."""

    def __post_init__(self) -> None:
        if self.max_skipped_in_a_row < 0:
            raise ValueError(
                f"max_skipped_in_a_row must be 0 or more, got {self.max_skipped_in_a_row}"
            )
        if self.spike_score < 0:
            raise ValueError(f"spike_score must be 0 or more, got {self.spike_score}")
        if self.spike_window < FEWEST:
            raise ValueError(f"spike_window must be at least {FEWEST}, got {self.spike_window}")


class Anomalies:
    """Counts skipped steps, and scores the others. The same on every rank."""

    def __init__(self, config: AnomalyConfig) -> None:
        self.config = config
        self.skipped_in_a_row = 0
        self._values: dict[str, deque[float]] = {}

    def skipped(self) -> bool:
        """A step was skipped; returns whether the run can go on."""
        self.skipped_in_a_row += 1
        return self.skipped_in_a_row <= self.config.max_skipped_in_a_row

    def spikes(self, **values: float) -> dict[str, float]:
        """Scores of those of a finished step's `values` that are spikes, by name.

        A spike is left out of what later values are compared with.
        """
        self.skipped_in_a_row = 0
        if not self.config.spike_score:
            return {}
        found = {}
        for name, value in values.items():
            before = self._values.setdefault(name, deque(maxlen=self.config.spike_window))
            score = robust_score(value, before)
            if score > self.config.spike_score:
                found[name] = score
            else:
                before.append(value)
        return found


def robust_score(value: float, before: deque[float]) -> float:
    """How far `value` lies above the median of `before`, in robust standard deviations."""
    if len(before) < FEWEST:
        return 0.0
    median = statistics.median(before)
    spread = MAD_TO_SIGMA * statistics.median(abs(other - median) for other in before)
    # Values that hardly differ must not make a spike of noise.
    return (value - median) / max(spread, 1e-3 * abs(median), 1e-12)
