"""Saves of a run: what is told of them, and what follows when one fails."""

from typing import Any

from pipeline.checkpoint.write import Checkpoints, Failed, Saved
from pipeline.training.moments import Guards, Moments, TrainingStoppedError, make_event
from pipeline.training.state import TrainState


class Saver:
    """Saves the run, and knows which step is on disk; all ranks call each method together.

    Args:
        engine: of the run.
        checkpoints: of the run directory.
        moments: all who are told.
        guards: those among them that have something to keep.
        saved_step: the step that is on disk already.
    """

    def __init__(
        self,
        engine: Any,
        checkpoints: Checkpoints,
        moments: Moments,
        guards: Guards,
        saved_step: int,
    ) -> None:
        self.engine = engine
        self.checkpoints = checkpoints
        self.moments = moments
        self.guards = guards
        self.saved_step = saved_step
        """The last step that was saved, or is being saved."""

    def save(self, state: TrainState, *, must: bool) -> None:
        """Save `state`; without `must` a failure may be left at a warning."""
        self.moments.on_phase("saving")
        self._follow(self.checkpoints.poll(wait=True))
        self.saved_step = state.step
        self.guards.before_save(state)
        self._follow(self.checkpoints.save(self.engine, state), must=must)
        if must:
            self._follow(self.checkpoints.poll(wait=True), must=True)

    def save_before_leaving(self, state: TrainState) -> None:
        """Whatever is not on disk yet has to be now."""
        self.moments.on_phase("saving")
        self._follow(self.checkpoints.poll(wait=True), must=self.saved_step == state.step)
        if self.saved_step < state.step:
            self.save(state, must=True)

    def poll(self, *, wait: bool) -> None:
        """Tell what has come of a save in the background, if it has ended."""
        self._follow(self.checkpoints.poll(wait=wait))

    def _follow(self, outcome: Saved | Failed | None, *, must: bool = False) -> None:
        if isinstance(outcome, Saved):
            text = f"{outcome.name}: {outcome.bytes:,} bytes in {outcome.total_s:.1f} s"
            times = {"bytes": outcome.bytes, "held_s": outcome.held_s, "total_s": outcome.total_s}
            event = make_event("checkpoint_saved", outcome.step, text, name=outcome.name, **times)
            self.moments.on_event(event)
            self.moments.on_checkpoint(outcome.step, outcome.name)
            for line in outcome.undeleted:
                text = f"{line}; the run goes on, and tries again after its next checkpoint"
                self.moments.on_event(make_event("checkpoint_not_deleted", outcome.step, text))
        elif isinstance(outcome, Failed):
            self.moments.on_event(make_event("checkpoint_failed", outcome.step, outcome.message))
            newest = self.checkpoints.newest()
            if must or self.checkpoints.config.on_failure == "stop":
                kept = f"{newest} is intact" if newest else "there is none before it"
                raise TrainingStoppedError(
                    f"checkpoint of step {outcome.step} could not be written: {outcome.message}; "
                    f"{kept}, and the same command continues when there is room"
                )
