"""Steps that went wrong: not finite, or far outside of what came before."""

import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.training.config import FEWEST, REPORT, AnomalyConfig
from pipeline.training.moments import Guard, TrainingStoppedError, make_event
from pipeline.training.state import TrainState
from pipeline.training.step import StepDone

MAD_TO_SIGMA = 1.4826
"""Median absolute deviation times this estimates the standard deviation of a normal sample."""


@dataclass(frozen=True)
class Spike:
    """What a step was refused for."""

    quantity: str
    """`loss` or `grad_norm`."""
    value: float
    score: float

    def __str__(self) -> str:
        return f"{self.quantity} {self.value:.4g} is a spike"


class Anomalies(Guard):
    """Scores steps, refuses spikes where that is asked for, and counts steps that were skipped."""

    def __init__(self, config: AnomalyConfig) -> None:
        self.config = config
        self.may_refuse = config.on_spike != REPORT
        self.skipped_in_a_row = 0
        self._values: dict[str, deque[float]] = {}

    def on_start(self, state: TrainState) -> None:
        self.load(state.anomalies)

    def on_rollback(self, state: TrainState) -> None:
        self.load(state.anomalies)

    def before_save(self, state: TrainState) -> None:
        state.anomalies = self.to_dict()

    def refuses(self, quantity: str, value: float) -> bool:
        return self.score(quantity, value) > self.config.spike_score

    def after_step(self, done: StepDone) -> None:
        if done.result.applied:
            self._report_spikes(done)
        else:
            self._report_skipped(done)

    def _report_spikes(self, done: StepDone) -> None:
        values = {"loss": done.result.loss, "grad_norm": done.result.grad_norm}
        for name, score in self.spikes(**values).items():
            text = f"{name} {values[name]:.4g} is a spike (robust z-score {score:.1f})"
            details = {"quantity": name, "value": values[name], "score": score, **done.sequences}
            self.report(make_event("spike", done.step, f"{text}; the step counts", **details))

    def _report_skipped(self, done: StepDone) -> None:
        spike = self.refused(done)
        what = "gradient" if done.result.loss_is_finite else "loss"
        why, details = f"{what} is not finite", {"quantity": what}
        if spike is not None:
            why, details = f"{spike} (robust z-score {spike.score:.1f})", vars(spike)
        order = f"sequences {done.first_sequence} to {done.last_sequence}"
        text = f"{why}, so the step was skipped ({order})"
        self.report(make_event("step_skipped", done.step, text, **details, **done.sequences))
        if not self.skipped():
            raise TrainingStoppedError(
                f"step {done.step}: {why} ({order} of the run's order); "
                f"the {self.skipped_in_a_row - 1} steps before it were skipped, too; no "
                "update of them was applied, and the last checkpoint is intact; lower "
                "optimizer.learning_rate or look at these sequences"
            )

    def refused(self, done: StepDone) -> "Spike | None":
        """What the step was refused for; None where it was not."""
        quantity = done.result.refused
        if quantity is None:
            return None
        value = getattr(done.result, quantity)
        return Spike(quantity, value, self.score(quantity, value))

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
        spikes = {}
        for name, value in values.items():
            score = self.score(name, value)
            if score > self.config.spike_score:
                spikes[name] = score
            else:
                self._before(name).append(value)
        return spikes

    def score(self, name: str, value: float) -> float:
        """The robust z-score of `value` among the last ones of that name."""
        return robust_score(value, self._before(name))

    def to_dict(self) -> dict[str, Any]:
        """All that later scores and counts depend on, for a checkpoint."""
        recent = {name: list(values) for name, values in self._values.items()}
        return {"skipped_in_a_row": self.skipped_in_a_row, "recent": recent}

    def load(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `to_dict` gave; from nothing, where it is empty."""
        self.skipped_in_a_row = int(saved.get("skipped_in_a_row", 0))
        self._values.clear()
        for name, values in saved.get("recent", {}).items():
            self._before(name).extend(values)

    def _before(self, name: str) -> deque[float]:
        return self._values.setdefault(name, deque(maxlen=self.config.spike_window))


def robust_score(value: float, before: deque[float]) -> float:
    """How far `value` lies above the median of `before`, in robust standard deviations."""
    if len(before) < FEWEST:
        return 0.0
    median = statistics.median(before)
    spread = MAD_TO_SIGMA * statistics.median(abs(other - median) for other in before)
    # Values that hardly differ must not make a spike of noise.
    return (value - median) / max(spread, 1e-3 * abs(median), 1e-12)
