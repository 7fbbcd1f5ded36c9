"""Going back to the last checkpoint after a spike, and on from there without its sequences.

These are kept in `left_out.json` of the run directory, written before the checkpoint is loaded, so
that a crash at any moment finds them again; and, as ranges, in every later checkpoint.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.checkpoint.retention import step_in_name
from pipeline.distributed import World
from pipeline.training.config import ROLLBACK
from pipeline.training.guards.anomalies import Anomalies
from pipeline.training.moments import Event, TrainingStoppedError, make_event
from pipeline.training.step import StepDone
from tidar_common.errors import UserError
from tidar_common.files import write_text_atomic

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
