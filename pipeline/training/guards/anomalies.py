"""Steps that went wrong: not finite, or far outside of what came before; and going back to the last
checkpoint after such a spike, and on from there without its sequences.

These are kept in `left_out.json` of the run directory, written before the checkpoint is loaded, so
that a crash at any moment finds them again; and, as ranges, in every later checkpoint.
"""

import json
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.checkpoint.retention import step_in_name
from pipeline.data.order import TrainState
from pipeline.distributed import World
from pipeline.training.config import FEWEST, REPORT, ROLLBACK, AnomalyConfig
from pipeline.training.moments import Event, Guard, TrainingStoppedError, make_event
from pipeline.training.step import StepDone
from tidar_common.errors import UserError
from tidar_common.files import write_text_atomic

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


LEFT_OUT = "left_out.json"
Range = tuple[int, int]
"""First order number, and the one behind the last."""


@dataclass(frozen=True)
class LeftOut:
    """Why some sequences are left out."""

    first_sequence: int
    last_sequence: int
    """Order numbers of the run, both included."""
    step: int
    """The step that spiked."""
    to_step: int
    """That of the checkpoint which the run went back to."""
    quantity: str
    """`loss` or `grad_norm`."""
    value: float
    score: float

    @property
    def range(self) -> Range:
        return self.first_sequence, self.last_sequence + 1

    def __str__(self) -> str:
        return f"{self.quantity} {self.value:.4g} at step {self.step} is a spike"


class LeftOutFile:
    """The list of a run directory; the same on all ranks, which call each method together.

    Raises:
        UserError: on all ranks, when the file is there and damaged.
    """

    def __init__(self, run_dir: Path, world: World) -> None:
        self.path = run_dir / LEFT_OUT
        self.world = world
        entries, problem = world.from_main(self._read() if world.is_main else None)
        if problem is not None:
            raise UserError(problem)
        self.entries: list[LeftOut] = entries

    def ranges(self, known: Iterable[Range]) -> list[Range]:
        """All ranges to leave out, those `known` from a checkpoint among them."""
        return merged([*known, *(entry.range for entry in self.entries)])

    def rollbacks_to(self, step: int) -> int:
        """How often the run went back to the checkpoint of `step`."""
        return sum(entry.to_step == step for entry in self.entries)

    def add(self, entry: LeftOut) -> str | None:
        """Write `entry` to disk; returns why that cannot be, if so."""
        self.entries.append(entry)
        return self.world.from_main(self._write() if self.world.is_main else None)

    def _read(self) -> tuple[list[LeftOut], str | None]:
        if not self.path.exists():
            return [], None
        try:
            rows: list[dict[str, Any]] = json.loads(self.path.read_text())
            return [LeftOut(**row) for row in rows], None
        except (OSError, ValueError, TypeError) as error:
            return [], (
                f"{self.path}: is damaged ({error}); restore it, or delete it to train on the "
                "sequences that it names"
            )

    def _write(self) -> str | None:
        try:
            rows = [asdict(entry) for entry in self.entries]
            write_text_atomic(self.path, json.dumps(rows, indent=1) + "\n")
        except OSError as error:
            return f"{self.path}: cannot be written ({error})"
        return None


class Rollbacks:
    """Which steps the run goes back for, and the record of it. The same on all ranks.

    Args:
        anomalies: scores the spikes; its config says what follows one.
        record: of the run directory.
    """

    def __init__(self, anomalies: Anomalies, record: LeftOutFile) -> None:
        self.anomalies = anomalies
        self.record = record

    def wanted(self, done: StepDone) -> bool:
        return done.result.refused is not None and self.anomalies.config.on_spike == ROLLBACK

    def leave_out(self, done: StepDone, newest: str) -> LeftOut:
        """Write down that the run goes on from the checkpoint `newest` without the sequences of
        the step that is `done`; raises TrainingStoppedError when it cannot, or has too often."""
        spike, to_step = self.anomalies.refused(done), step_in_name(newest)
        assert spike is not None
        before = self.record.rollbacks_to(to_step)
        if before >= self.anomalies.config.max_rollbacks:
            raise TrainingStoppedError(
                f"{spike.quantity} {spike.value:.4g} at step {done.step} is a spike again: the run "
                f"went back to {newest} {before} times; lower optimizer.learning_rate, or "
                "raise anomalies.spike_score or anomalies.max_rollbacks"
            )
        entry = LeftOut(
            done.first_sequence, done.last_sequence, done.step, to_step,
            spike.quantity, spike.value, spike.score,
        )  # fmt: skip
        problem = self.record.add(entry)
        if problem is not None:
            raise TrainingStoppedError(f"{entry}, and going back is not possible: {problem}")
        return entry


def rolled_back(entry: LeftOut, to_step: int) -> Event:
    """The event of a run that is at `to_step` again."""
    text = (
        f"{entry} (robust z-score {entry.score:.1f}); back to step {to_step}, and "
        f"on without sequences {entry.first_sequence} to {entry.last_sequence}"
    )
    details = {**asdict(entry), "to_step": to_step}
    return make_event("rolled_back", details.pop("step"), text, **details)


def merged(ranges: Iterable[Range]) -> list[Range]:
    """The same numbers as sorted ranges that neither overlap nor touch."""
    joined: list[Range] = []
    for first, end in sorted(ranges):
        if joined and first <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((first, end))
    return joined
