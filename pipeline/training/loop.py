"""The training loop: steps, and what is due between them."""

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

from pipeline.checkpoint.retention import step_in_name
from pipeline.checkpoint.write import Checkpoints, Failed, Saved
from pipeline.data.batch import Batch
from pipeline.data.order import numbers_after
from pipeline.distributed import World
from pipeline.evals.settings import EvalInterruptedError
from pipeline.training.evaluation import PeriodicEval
from pipeline.training.guards.anomalies import ROLLBACK, Anomalies
from pipeline.training.guards.left_out import LeftOut, LeftOutFile
from pipeline.training.guards.mask_embedding import MaskEmbedding
from pipeline.training.guards.skipped_shards import SkippedShards
from pipeline.training.guards.slow_ranks import SlowRanks
from pipeline.training.guards.watchdog import DATA, Watchdog
from pipeline.training.launch.signals import StopRequest
from pipeline.training.schedule import learning_rate
from pipeline.training.settings import TrainSettings
from pipeline.training.speed import SpeedMeter
from pipeline.training.state import TrainState
from pipeline.training.step import (
    GlobalCounts,
    StepResult,
    count_globally,
    digests_in_order,
    train_step,
)
from pipeline.training.trackers import Event, StepMetrics, Tracker, make_event


class TrainingStoppedError(RuntimeError):
    """The run cannot go on; the last checkpoint is untouched."""


@dataclass
class Trainer:
    """Runs the steps of `settings` from `state` on; the same on every rank."""

    settings: TrainSettings
    engine: Any
    state: TrainState
    open_batches: Callable[[TrainState], Generator[list[Batch]]]
    """The batches after a state, read ahead until they are closed."""
    world: World
    checkpoints: Checkpoints
    periodic_eval: PeriodicEval
    trackers: Tracker
    watchdog: Watchdog
    slow_ranks: SlowRanks
    anomalies: Anomalies
    left_out: LeftOutFile
    skipped_shards: SkippedShards
    say: Callable[[str], None]
    """Tells the user something, on rank 0."""
    meter: SpeedMeter
    mask_embedding: MaskEmbedding
    notes: list[Event] = field(default_factory=list)
    """What happened before the first step."""

    def __post_init__(self) -> None:
        self.saved_at = self.state.step
        self.stop = StopRequest()
        self.batches = self.open_batches(self.state)
        self.anomalies.load(self.state.anomalies)

    def run(self, stop: StopRequest) -> bool:
        """Train to the last step, or until `stop`; returns whether all steps are done."""
        self.stop = stop
        self.trackers.on_start(self.state)
        for event in self.notes:
            self.trackers.on_event(event)
        try:
            finished = self._measure_base() and self._run_steps()
        finally:
            self.batches.close()
        self.trackers.on_end(self.state, finished)
        return finished

    def _run_steps(self) -> bool:
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
            skipped = self.skipped_shards.new()
            counts = count_globally(batches, self.world, bool(self.stop), objective, skipped)
            if counts.stop_requests:
                self._save_before_leaving()
                return False
            if counts.damaged_shards:
                for event in self.skipped_shards.record():
                    self.trackers.on_event(event)
            rate = self._learning_rate()
            self.meter.begin()
            result = train_step(
                self.engine,
                batches,
                counts,
                objective,
                self.world,
                rate,
                self.settings.attention,
                self.anomalies.judge,
            )
            self._count(batches, counts)
            if result.refused is not None and self._rolled_back(result):
                continue
            if result.finite and result.refused is None:
                seconds = time.perf_counter() - started
                self._tell_step(result, rate, counts, seconds, waited)
            else:
                self._tell_skipped(result)
            evaluated = self._do_what_is_due(waited)
        self._save_before_leaving()
        return evaluated

    def _count(self, batches: list[Batch], counts: GlobalCounts) -> None:
        """A step was made of `batches`, whatever came of it."""
        state = self.state
        first = numbers_after(state.sequences_seen, 1, state.left_out)[0]
        state.step += 1
        state.tokens += counts.clean_tokens
        state.consume(digests_in_order(batches, self.world))
        self.sequences = {"first_sequence": first, "last_sequence": state.sequences_seen - 1}

    def _do_what_is_due(self, waited: float) -> bool:
        """What follows a step; returns whether an eval that was due came to its end."""
        self.slow_ranks.waited(waited)
        for event in self.slow_ranks.compare(self.state.step):
            self.trackers.on_event(event)
        # Saved first: a stop or a crash in a long eval must not cost the steps before it.
        last = self.state.step == self.settings.steps
        if last or self.state.step % self.settings.checkpoint.every == 0:
            self._save(must=last)
        due = self.periodic_eval.due(self.state.step, self.settings.steps)
        return self._evaluate() if due else True

    def _tell_step(
        self,
        result: StepResult,
        rate: float,
        counts: GlobalCounts,
        seconds: float,
        waited: float,
    ) -> None:
        speed = self.meter.measure(counts, seconds)
        mask = self.mask_embedding.read()
        self.trackers.on_step(
            StepMetrics(
                step=self.state.step,
                loss=result.loss,
                loss_ar=result.loss_ar,
                loss_diffusion=result.loss_diffusion,
                loss_alone=result.loss_alone,
                learning_rate=rate,
                grad_norm=result.grad_norm,
                tokens=self.state.tokens,
                tokens_per_second=counts.clean_tokens / seconds,
                sequences_seen=self.state.sequences_seen,
                data_digest=self.state.data_digest,
                step_seconds=seconds,
                data_wait_seconds=waited,
                model_tflops=speed.model_tflops,
                mfu=speed.mfu,
                peak_memory_bytes=speed.peak_memory_bytes,
                mask_embedding_norm=mask.norm if mask else None,
            )
        )
        if mask is not None and (text := self.mask_embedding.left(mask)):
            self._tell("mask_embedding", text, norm=mask.norm, share=mask.share)
        spikes = self.anomalies.spikes(loss=result.loss, grad_norm=result.grad_norm)
        for name, score in spikes.items():
            value = getattr(result, name)
            text = f"{name} {value:.4g} is a spike (robust z-score {score:.1f}); the step counts"
            details = {"value": value, "score": score, **self.sequences}
            self._tell("spike", text, quantity=name, **details)

    def _tell_skipped(self, result: StepResult) -> None:
        what = result.refused or ("gradient" if result.loss_is_finite else "loss")
        details = self._spike(result) if result.refused else {}
        why = f"{what} is not finite"
        if result.refused:
            score = f"robust z-score {details['score']:.1f}"
            why = f"{what} {details['value']:.4g} is a spike ({score})"
        first, last = self.sequences["first_sequence"], self.sequences["last_sequence"]
        text = f"{why}, so the step was skipped (sequences {first} to {last})"
        self._tell("step_skipped", text, quantity=what, **details, **self.sequences)
        if not self.anomalies.skipped():
            raise TrainingStoppedError(
                f"step {self.state.step}: {why} (sequences {first} to {last} of the run's order); "
                f"the {self.anomalies.skipped_in_a_row - 1} steps before it were skipped, too; no "
                "update of them was applied, and the last checkpoint is intact; lower "
                "optimizer.learning_rate or look at these sequences"
            )

    def _spike(self, result: StepResult) -> dict[str, float]:
        """Value and score of what the step was refused for."""
        assert result.refused is not None
        value = getattr(result, result.refused)
        return {"value": value, "score": self.anomalies.score(result.refused, value)}

    def _rolled_back(self, result: StepResult) -> bool:
        """Go back to the last checkpoint, and from there on without this step's sequences.

        Returns False, with nothing done, when that is not wanted or there is no checkpoint yet.
        """
        if self.settings.anomalies.on_spike != ROLLBACK:
            return False
        self.watchdog.enter("going back to a checkpoint")
        self._tell_saved(self.checkpoints.poll(wait=True))
        newest = self.world.from_main(self.checkpoints.newest())
        if newest is None:
            return False
        assert result.refused is not None
        spike, step, to_step = self._spike(result), self.state.step, step_in_name(newest)
        what = f"{result.refused} {spike['value']:.4g} at step {step} is a spike"
        if self.left_out.rollbacks_to(to_step) >= self.settings.anomalies.max_rollbacks:
            raise TrainingStoppedError(
                f"{what} again: the run went back to {newest} "
                f"{self.left_out.rollbacks_to(to_step)} times; lower optimizer.learning_rate, or "
                "raise anomalies.spike_score or anomalies.max_rollbacks"
            )
        first, last = self.sequences["first_sequence"], self.sequences["last_sequence"]
        entry = LeftOut(first, last, step, to_step, result.refused, spike["value"], spike["score"])
        problem = self.left_out.add(entry)
        if problem is not None:
            raise TrainingStoppedError(f"{what}, and going back is not possible: {problem}")
        self._restore()
        text = f"{what} (robust z-score {spike['score']:.1f}); back to step {self.state.step}, and "
        text += f"on without sequences {first} to {last}"
        details = {"quantity": result.refused, "to_step": self.state.step, **spike}
        event = make_event("rolled_back", step, text, **details, **self.sequences)
        self.trackers.on_event(event)
        return True

    def _restore(self) -> None:
        """Put the newest undamaged checkpoint in place of everything since."""
        state, told = self.checkpoints.restore(self.engine, self.say)
        assert state is not None, "a checkpoint was there a moment ago"
        for name, reason in told["damaged"].items():
            self._tell("checkpoint_damaged", reason, name=name)
        state.left_out = self.left_out.ranges(state.left_out)
        self.state, self.saved_at = state, state.step
        self.anomalies.load(state.anomalies)
        self.batches.close()
        self.batches = self.open_batches(state)
        self.trackers.on_rollback(state)

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
        self.trackers.on_eval(rows)
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
        self.state.anomalies = self.anomalies.to_dict()
        self._tell_saved(self.checkpoints.save(self.engine, self.state), must=must)
        if must:
            self._tell_saved(self.checkpoints.poll(wait=True), must=True)

    def _tell_saved(self, outcome: Saved | Failed | None, *, must: bool = False) -> None:
        if isinstance(outcome, Saved):
            text = f"{outcome.name}: {outcome.bytes:,} bytes in {outcome.total_s:.1f} s"
            times = {"bytes": outcome.bytes, "held_s": outcome.held_s, "total_s": outcome.total_s}
            event = make_event("checkpoint_saved", outcome.step, text, name=outcome.name, **times)
            self.trackers.on_event(event)
            self.trackers.on_checkpoint(outcome.step, outcome.name)
        elif isinstance(outcome, Failed):
            self.trackers.on_event(make_event("checkpoint_failed", outcome.step, outcome.message))
            newest = self.world.from_main(self.checkpoints.newest())
            if must or self.settings.checkpoint.on_failure == "stop":
                kept = f"{newest} is intact" if newest else "there is none before it"
                raise TrainingStoppedError(
                    f"checkpoint of step {outcome.step} could not be written: {outcome.message}; "
                    f"{kept}, and the same command continues when there is room"
                )

    def _tell(self, kind: str, message: str, **details: Any) -> None:
        self.trackers.on_event(make_event(kind, self.state.step, message, **details))
