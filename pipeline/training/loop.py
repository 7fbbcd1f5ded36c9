"""The training loop: steps, and what is due between them."""

import contextlib
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

from pipeline.data.batch import Batch
from pipeline.distributed import World
from pipeline.evals.interruption import EvalInterruptedError
from pipeline.training.anomalies import Anomalies
from pipeline.training.callbacks import Callback, Event, StepMetrics, make_event
from pipeline.training.checkpoints import Checkpoints, Failed, Saved
from pipeline.training.evaluation import PeriodicEval
from pipeline.training.schedule import learning_rate
from pipeline.training.settings import TrainSettings
from pipeline.training.signals import StopRequest
from pipeline.training.slow_ranks import SlowRanks
from pipeline.training.state import TrainState
from pipeline.training.step import StepResult, count_globally, digests_in_order, train_step
from pipeline.training.watchdog import DATA, Watchdog


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
    watchdog: Watchdog
    slow_ranks: SlowRanks
    anomalies: Anomalies
    notes: list[Event] = field(default_factory=list)
    """What happened before the first step."""

    def __post_init__(self) -> None:
        self.saved_at = self.state.step
        self.stop = StopRequest()

    def run(self, stop: StopRequest) -> bool:
        """Train to the last step, or until `stop`; returns whether all steps are done."""
        self.stop = stop
        self.callbacks.on_start(self.state)
        for event in self.notes:
            self.callbacks.on_event(event)
        with contextlib.closing(self.batches):
            finished = self._measure_base() and self._run_steps(stop)
        self.callbacks.on_end(self.state, finished)
        return finished

    def _run_steps(self, stop: StopRequest) -> bool:
        evaluated = True
        if self.periodic_eval.missing(self.state.step, self.settings.steps):
            evaluated = self._evaluate()  # a run that ended between a save and the eval after it
        while self.state.step < self.settings.steps:
            started = time.perf_counter()
            self.watchdog.enter(DATA)
            batches = next(self.batches)
            waited = time.perf_counter() - started
            self.watchdog.enter("in a step")
            self._tell_saved(self.checkpoints.poll(wait=False))
            objective = self.settings.objective.at(self.state.step)
            counts = count_globally(batches, self.world, bool(stop), objective)
            if counts.stop_requests:
                self._save_before_leaving()
                return False
            rate = self._learning_rate()
            result = train_step(self.engine, batches, counts, objective, self.world, rate)
            self.state.step += 1
            self.state.tokens += counts.clean_tokens
            self.state.consume(digests_in_order(batches, self.world))
            if result.finite:
                seconds = time.perf_counter() - started
                self._tell_step(result, rate, counts.clean_tokens, seconds, waited)
            else:
                self._tell_skipped(result)
            evaluated = self._do_what_is_due(waited)
        self._save_before_leaving()
        return evaluated

    def _do_what_is_due(self, waited: float) -> bool:
        """What follows a step; returns whether an eval that was due came to its end."""
        self.slow_ranks.waited(waited)
        for event in self.slow_ranks.compare(self.state.step):
            self.callbacks.on_event(event)
        # Saved first: a stop or a crash in a long eval must not cost the steps before it.
        last = self.state.step == self.settings.steps
        if last or self.state.step % self.settings.checkpoint.every == 0:
            self._save(must=last)
        due = self.periodic_eval.due(self.state.step, self.settings.steps)
        return self._evaluate() if due else True

    def _tell_step(
        self, result: StepResult, rate: float, tokens: int, seconds: float, waited: float
    ) -> None:
        self.callbacks.on_step(
            StepMetrics(
                step=self.state.step,
                loss=result.loss,
                loss_ar=result.loss_ar,
                loss_diffusion=result.loss_diffusion,
                learning_rate=rate,
                grad_norm=result.grad_norm,
                tokens=self.state.tokens,
                tokens_per_second=tokens / seconds,
                sequences_seen=self.state.sequences_seen,
                data_digest=self.state.data_digest,
                step_seconds=seconds,
                data_wait_seconds=waited,
            )
        )
        spikes = self.anomalies.spikes(loss=result.loss, grad_norm=result.grad_norm)
        for name, score in spikes.items():
            value = getattr(result, name)
            text = f"{name} {value:.4g} is a spike (robust z-score {score:.1f}); the step counts"
            details = {"value": value, "score": score, **self._sequences()}
            self._tell("spike", text, quantity=name, **details)

    def _tell_skipped(self, result: StepResult) -> None:
        what = "loss" if not result.loss_is_finite else "gradient"
        sequences = self._sequences()
        first, last = sequences["first_sequence"], sequences["last_sequence"]
        text = f"{what} is not finite, so the step was skipped (sequences {first} to {last})"
        self._tell("step_skipped", text, quantity=what, **sequences)
        if not self.anomalies.skipped():
            raise TrainingStoppedError(
                f"step {self.state.step}: loss or gradient norm is not finite (sequences {first} "
                f"to {last} of the run's order), as in the {self.anomalies.skipped_in_a_row - 1} "
                "steps before it; no update of them was applied, and the last checkpoint is "
                "intact; lower optimizer.learning_rate or look at these sequences"
            )

    def _sequences(self) -> dict[str, int]:
        """The order numbers of the last step's sequences."""
        end = self.state.sequences_seen
        return {
            "first_sequence": end - self.settings.global_batch_size,
            "last_sequence": end - 1,
        }

    def _learning_rate(self) -> float:
        settings = self.settings
        peak = settings.optimizer.learning_rate
        return learning_rate(self.state.step, settings.steps, peak, settings.schedule)

    def _measure_base(self) -> bool:
        self.watchdog.enter("in an eval")
        try:
            self.periodic_eval.measure_base(self.engine, self.state.step, self.stop)
        except EvalInterruptedError:
            return False
        return True

    def _evaluate(self) -> bool:
        """Evaluate, unless asked to stop meanwhile: the next start then does it from its start."""
        self.watchdog.enter("in an eval")
        try:
            rows = self.periodic_eval.run(self.engine, self.state.step, self.stop)
        except EvalInterruptedError:
            return False
        self.callbacks.on_eval(rows)
        return True

    def _save_before_leaving(self) -> None:
        """Whatever is not on disk yet has to be now."""
        self.watchdog.enter("saving")
        self._tell_saved(self.checkpoints.poll(wait=True), must=self.saved_at == self.state.step)
        if self.saved_at < self.state.step:
            self._save(must=True)

    def _save(self, *, must: bool) -> None:
        """Save this step; without `must` a failure may be left at a warning."""
        self.watchdog.enter("saving")
        self._tell_saved(self.checkpoints.poll(wait=True))
        self.saved_at = self.state.step
        self._tell_saved(self.checkpoints.save(self.engine, self.state), must=must)
        if must:
            self._tell_saved(self.checkpoints.poll(wait=True), must=True)

    def _tell_saved(self, outcome: Saved | Failed | None, *, must: bool = False) -> None:
        if isinstance(outcome, Saved):
            text = f"{outcome.name}: {outcome.bytes:,} bytes in {outcome.total_s:.1f} s"
            times = {"bytes": outcome.bytes, "held_s": outcome.held_s, "total_s": outcome.total_s}
            event = make_event("checkpoint_saved", outcome.step, text, name=outcome.name, **times)
            self.callbacks.on_event(event)
            self.callbacks.on_checkpoint(outcome.step, outcome.name)
        elif isinstance(outcome, Failed):
            self.callbacks.on_event(make_event("checkpoint_failed", outcome.step, outcome.message))
            newest = self.world.from_main(self.checkpoints.newest())
            if must or self.settings.checkpoint.on_failure == "stop":
                kept = f"{newest} is intact" if newest else "there is none before it"
                raise TrainingStoppedError(
                    f"checkpoint of step {outcome.step} could not be written: {outcome.message}; "
                    f"{kept}, and the same command continues when there is room"
                )

    def _tell(self, kind: str, message: str, **details: Any) -> None:
        self.callbacks.on_event(make_event(kind, self.state.step, message, **details))
