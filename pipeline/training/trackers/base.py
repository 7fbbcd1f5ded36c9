"""The moments at which a run can be watched, all on rank 0."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from pipeline.training.state import TrainState

Event = dict[str, Any]
"""One line of `events.jsonl`: `time`, `event`, `step`, `message`, and details by kind."""
ROUTINE = ("started", "checkpoint_saved")
"""Events that nobody has to be told of at once."""


def make_event(kind: str, step: int, message: str, **details: Any) -> Event:
    """An event of now; `step` counts the steps done."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return {"time": now, "event": kind, "step": step, "message": message, **details}


CLOCK = (
    "tokens_per_second", "step_seconds", "data_wait_seconds", "model_tflops", "mfu",
    "peak_memory_bytes",
)  # fmt: skip
"""Keys of `metrics.jsonl` that tell how fast a run was and what it took, not what it did."""


@dataclass(frozen=True)
class StepMetrics:
    """One line of `metrics.jsonl`."""

    step: int
    loss: float
    loss_ar: float
    loss_diffusion: float | None
    loss_alone: float | None
    """Of drafts without slots; None where there are none."""
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


class Tracker:
    """Empty hooks; a tracker overrides what it needs."""

    def on_start(self, state: TrainState) -> None:
        """The run begins, or goes on, after `state.step` steps."""

    def on_step(self, metrics: StepMetrics) -> None:
        """An optimizer step is done."""

    def on_eval(self, rows: list[dict[str, Any]]) -> None:
        """A decode-speed eval is done; `rows` as in `evals/decode_speed.jsonl`."""

    def on_checkpoint(self, step: int, name: str) -> None:
        """A checkpoint became visible under `checkpoints/name`."""

    def on_event(self, event: Event) -> None:
        """Something happened; `event` as in `events.jsonl`."""

    def on_rollback(self, state: TrainState) -> None:
        """The run went back to `state`, and repeats the steps after it with other data."""

    def on_end(self, state: TrainState, finished: bool) -> None:
        """The run ends: all steps done, or stopped to be continued."""


class Trackers(Tracker):
    """Several trackers as one."""

    def __init__(self, members: Sequence[Tracker]) -> None:
        self.members = list(members)

    def on_start(self, state: TrainState) -> None:
        for member in self.members:
            member.on_start(state)

    def on_step(self, metrics: StepMetrics) -> None:
        for member in self.members:
            member.on_step(metrics)

    def on_eval(self, rows: list[dict[str, Any]]) -> None:
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
