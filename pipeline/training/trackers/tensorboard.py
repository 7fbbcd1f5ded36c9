"""The same numbers for TensorBoard, in run_dir/tensorboard. It never stops a run either."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.data.order import TrainState
from pipeline.training.moments import StepMetrics, Tracker
from pipeline.training.trackers.metrics import AXES, eval_values, step_values

FOLDER = "tensorboard"


def is_installed() -> bool:
    """Whether the package that torch.utils.tensorboard needs is there."""
    return find_spec("tensorboard") is not None


class TensorBoard(Tracker):
    """Scalars of steps and evals, over steps; a continued run hides what lies after its step."""

    def __init__(self, run_dir: Path, say: Callable[[str], None]) -> None:
        self.folder = run_dir / FOLDER
        self.say = say
        self.writer: Any = None

    def on_start(self, state: TrainState) -> None:
        self._guard("start", lambda: self._start(state.step))

    def on_step(self, metrics: StepMetrics) -> None:
        self._write(metrics.step, step_values(metrics))

    def on_eval(self, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            self._write(row["step"], eval_values(row))
        if self.writer is not None:
            self._guard("write", self.writer.flush)

    def on_rollback(self, state: TrainState) -> None:
        """What lies after `state` is hidden, as after a restart."""
        if self.writer is not None:
            self._guard("finish", self.writer.close)
            self._guard("start", lambda: self._start(state.step))

    def on_end(self, state: TrainState, finished: bool) -> None:
        if self.writer is not None:
            self._guard("finish", self.writer.close)

    def _start(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.folder), purge_step=step + 1 if step else None)

    def _write(self, step: int, values: dict[str, Any]) -> None:
        """Numbers only: the digest of the data, a text, is in metrics.jsonl."""
        writer = self.writer
        if writer is None:
            return
        for name, value in values.items():
            if name != AXES[0] and isinstance(value, int | float):
                self._guard("write", partial(writer.add_scalar, name, value, step))

    def _guard(self, what: str, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:
            if self.writer is not None or what == "start":
                self.say(
                    f"warning: TensorBoard could not {what} ({error}); training goes on without "
                    "it, metrics.jsonl has all numbers"
                )
            self.writer = None
