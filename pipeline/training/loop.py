"""The training loop: steps, and what is due between them."""

import contextlib
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.batch import Batch
from pipeline.training.callbacks import Callback, StepMetrics
from pipeline.training.checkpoints import Checkpoints
from pipeline.training.distributed import World
from pipeline.training.evaluation import PeriodicEval
from pipeline.training.schedule import learning_rate
from pipeline.training.settings import TrainSettings
from pipeline.training.signals import StopRequest
from pipeline.training.state import TrainState
from pipeline.training.step import count_globally, digests_in_order, train_step


class TrainingStoppedError(RuntimeError):
    """The run cannot go on; the last checkpoint is untouched."""


@dataclass
class Trainer:
    """Runs the steps of `settings` from `state` on; the same on every rank."""

    settings: TrainSettings
    engine: Any
    state: TrainState
    batches: Generator[list[Batch]]
    world: World
    checkpoints: Checkpoints
    periodic_eval: PeriodicEval
    callbacks: Callback
    identity: dict[str, Any]
    write_extra: Callable[[Path], None]

    def run(self, stop: StopRequest) -> bool:
        """Train to the last step, or until `stop`; returns whether all steps are done."""
        self.callbacks.on_start(self.state)
        with contextlib.closing(self.batches):
            finished = self._run_steps(stop)
        self.callbacks.on_end(self.state, finished)
        return finished

    def _run_steps(self, stop: StopRequest) -> bool:
        saved_at = self.state.step
        while self.state.step < self.settings.steps:
            started = time.perf_counter()
            batches = next(self.batches)
            waited = time.perf_counter() - started
            objective = self.settings.objective.at(self.state.step)
            counts = count_globally(batches, self.world, bool(stop), objective)
            if counts.stop_requests:
                if saved_at < self.state.step:
                    self._save()
                return False
            rate = self._learning_rate()
            result = train_step(self.engine, batches, counts, objective, self.world, rate)
            self._require_finite(result.finite)
            self.state.step += 1
            self.state.tokens += counts.clean_tokens
            self.state.consume(digests_in_order(batches, self.world))
            seconds = time.perf_counter() - started
            self.callbacks.on_step(
                StepMetrics(
                    step=self.state.step,
                    loss=result.loss,
                    loss_ar=result.loss_ar,
                    loss_diffusion=result.loss_diffusion,
                    learning_rate=rate,
                    grad_norm=result.grad_norm,
                    tokens=self.state.tokens,
                    tokens_per_second=counts.clean_tokens / seconds,
                    sequences_seen=self.state.sequences_seen,
                    data_digest=self.state.data_digest,
                    step_seconds=seconds,
                    data_wait_seconds=waited,
                )
            )
            if self.periodic_eval.due(self.state.step, self.settings.steps):
                self.callbacks.on_eval(self.periodic_eval.run(self.engine, self.state.step))
            last = self.state.step == self.settings.steps
            if last or self.state.step % self.settings.checkpoint.every == 0:
                self._save()
                saved_at = self.state.step
        return True

    def _learning_rate(self) -> float:
        settings = self.settings
        peak = settings.optimizer.learning_rate
        return learning_rate(self.state.step, settings.steps, peak, settings.schedule)

    def _save(self) -> None:
        name = self.checkpoints.save(self.engine, self.state, self.identity, self.write_extra)
        self.callbacks.on_checkpoint(self.state.step, name)

    def _require_finite(self, finite: bool) -> None:
        if finite:
            return
        first = self.state.sequences_seen
        last = first + self.settings.global_batch_size - 1
        raise TrainingStoppedError(
            f"step {self.state.step + 1}: loss or gradient norm is not finite (sequences {first} "
            f"to {last} of the run's order); nothing of it was saved and the last checkpoint is "
            "intact; lower optimizer.learning_rate or look at these sequences"
        )
