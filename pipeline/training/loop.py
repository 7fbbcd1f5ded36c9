"""The training loop: next batches, step, guards, trackers, and what is due between steps."""

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

from pipeline.data.batch import Batch
from pipeline.data.order import TrainState, numbers_after
from pipeline.distributed import World
from pipeline.training.due import PeriodicEval, Saver
from pipeline.training.engine import learning_rate
from pipeline.training.guards.anomalies import Rollbacks, rolled_back
from pipeline.training.guards.mask_embedding import MaskEmbedding
from pipeline.training.guards.skipped_shards import SkippedShards
from pipeline.training.launch.signals import StopRequest
from pipeline.training.moments import DATA, Event, Guards, Moments, make_event
from pipeline.training.settings import TrainSettings
from pipeline.training.speed import SpeedMeter, step_metrics
from pipeline.training.step import (
    StepDone,
    StepInput,
    count_globally,
    digests_in_order,
    train_step,
)  # fmt: skip


@dataclass
class Trainer:
    """Runs the steps of `settings` from `state` on; the same on every rank."""

    settings: TrainSettings
    engine: Any
    state: TrainState
    open_batches: Callable[[TrainState], Generator[list[Batch]]]
    """The batches after a state, read ahead until they are closed."""
    world: World
    moments: Moments
    """Guards and trackers together."""
    guards: Guards
    mask_embedding: MaskEmbedding
    skipped_shards: SkippedShards
    rollbacks: Rollbacks
    saver: Saver
    evals: PeriodicEval
    meter: SpeedMeter
    say: Callable[[str], None]
    """Tells the user something, on rank 0."""
    notes: list[Event] = field(default_factory=list)
    """What happened before the first step."""
    batches: Generator[list[Batch]] = field(init=False)
    """Those being trained on; opened by `run`."""

    def run(self, stop: StopRequest) -> bool:
        """Train to the last step, or until `stop`; returns whether all steps are done."""
        self.batches = self.open_batches(self.state)
        stop.newest = self.saver.checkpoints.newest
        self.moments.on_start(self.state)
        for event in self.notes:
            self.moments.on_event(event)
        try:
            self.moments.on_phase("in an eval")
            begun = self.evals.measure_base(self.engine, self.state.step, stop)
            finished = begun and self._run_steps(stop)
        finally:
            self.batches.close()
        self.moments.on_end(self.state, finished)
        return finished

    def _run_steps(self, stop: StopRequest) -> bool:
        evaluated, last = True, self.settings.steps
        if self.evals.missing(self.state.step, last):
            evaluated = self._evaluate(stop)  # a run that ended between a save and the eval
        while self.state.step < last:
            done = self._make_step(stop)
            if done is None:
                self.saver.save_before_leaving(self.state)
                return False
            if self.rollbacks.wanted(done) and self._go_back(done):
                continue
            if done.result.applied:
                speed = self.meter.measure(done.counts, done.seconds)
                norm = self.mask_embedding.norm
                self.moments.on_step(step_metrics(done, self.state, speed, norm))
            self.guards.after_step(done)
            # Saved first: a stop or a crash in a long eval must not cost the steps before it.
            if done.step == last or done.step % self.settings.checkpoint.every == 0:
                self.saver.save(self.state, must=done.step == last)
            evaluated = not self.evals.due(done.step, last) or self._evaluate(stop)
        self.saver.save_before_leaving(self.state)
        return evaluated

    def _make_step(self, stop: StopRequest) -> StepDone | None:
        """The next step of the run, whatever comes of it; None when some rank was asked to stop."""
        settings, state = self.settings, self.state
        started = time.perf_counter()
        self.moments.on_phase(DATA)
        batches = next(self.batches)
        waited = time.perf_counter() - started
        self.moments.on_phase("in a step")
        self.saver.poll(wait=False)
        step = StepInput(batches, settings.objective.at(state.step), settings.attention)
        damaged = self.skipped_shards.new()
        counts = count_globally(step, self.world, stop_requested=bool(stop), damaged_shards=damaged)
        if counts.stop_requests:
            return None
        self.guards.on_counts(counts, state.step)
        peak = settings.optimizer.learning_rate
        rate = learning_rate(state.step, settings.steps, peak, settings.schedule)
        self.meter.begin()
        result = train_step(self.engine, step, counts, self.world, rate, self.guards.judge)
        first = numbers_after(state.sequences_seen, 1, state.left_out)[0]
        state.step += 1
        state.tokens += counts.clean_tokens
        state.consume(digests_in_order(batches, self.world))
        last, seconds = state.sequences_seen - 1, time.perf_counter() - started
        return StepDone(state.step, result, counts, rate, first, last, seconds, waited)

    def _go_back(self, done: StepDone) -> bool:
        """Go back to the last checkpoint, and from there on without this step's sequences.

        Returns False, with nothing done, when there is no checkpoint yet.
        """
        self.moments.on_phase("going back to a checkpoint")
        self.saver.poll(wait=True)
        newest = self.saver.checkpoints.newest()
        if newest is None:
            return False
        entry = self.rollbacks.leave_out(done, newest)
        state, restored = self.saver.checkpoints.restore(self.engine, self.say)
        assert state is not None, "a checkpoint was there a moment ago"
        for name, reason in restored["damaged"].items():
            self.moments.on_event(make_event("checkpoint_damaged", done.step, reason, name=name))
        state.left_out = self.rollbacks.record.ranges(state.left_out)
        self.state, self.saver.saved_step = state, state.step
        self.batches.close()
        self.batches = self.open_batches(state)
        self.moments.on_rollback(state)
        self.moments.on_event(rolled_back(entry, state.step))
        return True

    def _evaluate(self, stop: StopRequest) -> bool:
        """Evaluate, unless asked to stop meanwhile: the next start then does it from its start."""
        self.moments.on_phase("in an eval")
        rows = self.evals.run(self.engine, self.state.step, stop)
        if rows is not None:
            self.moments.on_eval(rows)
        return rows is not None
