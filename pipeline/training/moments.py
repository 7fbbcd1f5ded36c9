"""The moments of a run, at which guards and trackers are called.

Trackers only watch, on rank 0. Guards act, on all ranks alike: they refuse a step, ask for a
rollback, end the run, or report an event.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pipeline.data.order import TrainState
from tidar_common.run_files import EvalRow

if TYPE_CHECKING:  # who only reads a run's files imports no model
    from pipeline.training.step import GlobalCounts, StepDone

Event = dict[str, Any]
"""One line of `events.jsonl`: `time`, `event`, `step`, `message`, and details by kind."""
ROUTINE = ("started", "checkpoint_saved")
"""Events that nobody has to be told of at once."""
CLOCK = (
    "tokens_per_second", "step_seconds", "data_wait_seconds", "model_tflops", "mfu",
    "peak_memory_bytes",
)  # fmt: skip
"""Keys of `metrics.jsonl` that tell how fast a run was and what it took, not what it did."""
DATA = "waiting for data"
"""The phase in which a rank depends on nobody but its disk."""


class TrainingStoppedError(RuntimeError):
    """The run cannot go on; the last checkpoint is untouched."""


def make_event(kind: str, step: int, message: str, **details: Any) -> Event:
    """An event of now; `step` counts the steps done."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return {"time": now, "event": kind, "step": step, "message": message, **details}


@dataclass(frozen=True)
class StepMetrics:
    """One line of `metrics.jsonl`."""

    step: int
    loss: float
    loss_ar: float
    loss_diffusion: float | None
    loss_alone: float | None
    """Of drafts of the head alone; None where there are none."""
    learning_rate: float
    grad_norm: float
    tokens: int
    """Clean tokens so far, without padding."""
    tokens_per_second: float
    sequences_seen: int
    data_digest: str
    step_seconds: float
    """Wall time of the step, waiting for data included."""
    data_wait_seconds: float
    model_tflops: float
    """TFLOP/s of one process that the batch needed."""
    mfu: float | None
    """Their share of the device's peak rate, where that is known."""
    peak_memory_bytes: int
    """Of rank 0; see `pipeline.training.speed.Speed`."""
    mask_embedding_norm: float | None
    """Before the step's update; None without a mask section."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Moments:
    """The moments, all empty: who is called overrides what it needs."""

    def on_start(self, state: TrainState) -> None:
        """The run begins, or goes on, after `state.step` steps."""

    def on_phase(self, what: str) -> None:
        """This rank begins with something else: waits for data, is in a step, saves, evaluates."""

    def on_step(self, metrics: StepMetrics) -> None:
        """An optimizer step is done, and counts."""

    def on_eval(self, rows: Sequence[EvalRow]) -> None:
        """A decode-speed eval is done; `rows` as in `evals/decode_speed.jsonl`."""

    def on_checkpoint(self, step: int, name: str) -> None:
        """A checkpoint became visible under `checkpoints/name`."""

    def on_event(self, event: Event) -> None:
        """Something happened; `event` as in `events.jsonl`."""

    def on_rollback(self, state: TrainState) -> None:
        """The run went back to `state`, and repeats the steps after it with other data."""

    def on_end(self, state: TrainState, finished: bool) -> None:
        """The run ends: all steps done, or stopped to be continued."""


class Tracker(Moments):
    """Only watches; on rank 0."""


class Guard(Moments):
    """May act; on all ranks, which call each moment together and decide alike."""

    may_refuse = False
    """Whether `refuses` is to be asked."""
    report: Callable[[Event], None] = staticmethod(lambda event: None)
    """Takes an event to all who write events down or pass them on; set by `Guards`."""

    def on_counts(self, counts: "GlobalCounts", step: int) -> None:
        """All ranks know what the step after `step` done ones is made of."""

    def refuses(self, quantity: str, value: float) -> bool:
        """Whether a step is not to count for its `loss` or `grad_norm`."""
        return False

    def after_step(self, done: "StepDone") -> None:
        """A step was made, whatever came of it; raises TrainingStoppedError to end the run."""

    def before_save(self, state: TrainState) -> None:
        """Put into `state` what has to be known after a restart."""


Member = TypeVar("Member", bound=Moments)


class Together(Moments, Generic[Member]):
    """Several as one, called in their order."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = list(members)

    def on_start(self, state: TrainState) -> None:
        for member in self.members:
            member.on_start(state)

    def on_phase(self, what: str) -> None:
        for member in self.members:
            member.on_phase(what)

    def on_step(self, metrics: StepMetrics) -> None:
        for member in self.members:
            member.on_step(metrics)

    def on_eval(self, rows: Sequence[EvalRow]) -> None:
        for member in self.members:
            member.on_eval(rows)

    def on_checkpoint(self, step: int, name: str) -> None:
        for member in self.members:
            member.on_checkpoint(step, name)

    def on_event(self, event: Event) -> None:
        for member in self.members:
            member.on_event(event)

    def on_rollback(self, state: TrainState) -> None:
        for member in self.members:
            member.on_rollback(state)

    def on_end(self, state: TrainState, finished: bool) -> None:
        for member in self.members:
            member.on_end(state, finished)


class Guards(Together[Guard]):
    """The guards of a run.

    Args:
        members: in the order in which they are called.
        report: takes what any of them reports.
    """

    def __init__(self, members: Sequence[Guard], report: Callable[[Event], None]) -> None:
        super().__init__(members)
        for member in members:
            member.report = report

    @property
    def judge(self) -> Callable[[str, float], bool] | None:
        """Whether any guard refuses a step for this quantity's value; None where none ever does."""
        asked = [member for member in self.members if member.may_refuse]
        if not asked:
            return None
        return lambda quantity, value: any(guard.refuses(quantity, value) for guard in asked)

    def on_counts(self, counts: "GlobalCounts", step: int) -> None:
        for member in self.members:
            member.on_counts(counts, step)

    def after_step(self, done: "StepDone") -> None:
        for member in self.members:
            member.after_step(done)

    def before_save(self, state: TrainState) -> None:
        for member in self.members:
            member.before_save(state)
