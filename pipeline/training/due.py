"""What is due between steps: saves, and the decode-speed eval. All ranks call these together."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.tokenizers.load import load_tokenizer
from pipeline.checkpoint.retention import eval_losses
from pipeline.checkpoint.write import Checkpoints, Failed, Saved
from pipeline.data.order import TrainState
from pipeline.distributed import World
from pipeline.evals.decode_speed import evaluate_decode_speed, write_example
from pipeline.evals.drafting import score_heldout
from pipeline.evals.heldout import HeldOut
from pipeline.evals.settings import Check, EvalInterruptedError, Progress
from pipeline.model.config import ModelConfig
from pipeline.training.engine import full_copy
from pipeline.training.guards.ar_guard import write_base
from pipeline.training.launch.signals import StopRequest
from pipeline.training.moments import Guards, Moments, TrainingStoppedError, make_event
from pipeline.training.settings import TrainSettings
from tidar_common.errors import UserError
from tidar_common.run_files import EvalRow


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


def open_heldout(
    settings: TrainSettings, config: ModelConfig, say: Callable[[str], None] = lambda text: None
) -> HeldOut:
    """The held-out split, with which a run's evals can be made; what is short of what they ask for
    is said.

    Raises:
        UserError: before the first step, not at the first eval, for what could not be decoded.
    """
    evals = settings.decode_speed
    longest = evals.prompt_tokens + evals.max_new_tokens
    if longest > config.max_positions:
        raise UserError(
            f"evals.decode_speed.max_new_tokens: {evals.prompt_tokens} prompt tokens "
            f"and {evals.max_new_tokens} new ones exceed the model's "
            f"{config.max_positions} positions; shorten one of them"
        )
    heldout = HeldOut(settings.data_dir, settings.manifest, settings.mix)
    heldout.prompts(1, evals.prompt_tokens, evals.seed)
    for line in heldout.shortages(evals):
        say(f"warning: {line}")
    return heldout


class PeriodicEval:
    """Holds what stays the same between evals; all ranks call it together."""

    def __init__(
        self,
        settings: TrainSettings,
        config: ModelConfig,
        world: World,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.settings = settings.decode_speed
        self.config = config
        self.world = world
        self.heldout = open_heldout(settings, config, say)
        self.tokenizer = load_tokenizer(settings.data_dir)
        self.run_dir = settings.run_dir
        self.init_from = settings.init_from
        self.say = say
        self.example: Path = settings.run_dir / "evals" / "example.json"

    def due(self, step: int, steps: int) -> bool:
        every = self.settings.every
        return step == steps or (every > 0 and step % every == 0)

    def missing(self, step: int, steps: int) -> bool:
        """Whether the eval that was due at the restored `step` was never written; on all ranks."""
        absent = False
        if self.world.is_main and step > 0 and self.due(step, steps):
            absent = step not in eval_losses(self.run_dir)
        return self.world.from_main(absent)

    def measure_base(self, engine: Any, step: int, stop: StopRequest) -> bool:
        """Before the first step of a run from a base model: its held-out AR loss, kept in the run
        directory, on the sequences that every eval scores. Returns False, on all ranks, when any of
        them was asked to stop meanwhile."""
        if step > 0 or self.init_from is None:
            return True
        self.say(
            f"measuring the held-out AR loss of {self.init_from} on "
            f"{self.settings.score_sequences} sequences"
        )
        # Without what drafts: its scores are not asked for, and take several times as long.
        plain = self.config.without_drafting()
        model = full_copy(engine, plain, self.tokenizer.vocab_size)
        check = self._check_for(stop)
        try:
            scores = score_heldout(model, self.heldout, self.settings, self.world, check)
        except EvalInterruptedError:
            return False
        if self.world.is_main:
            write_base(self.run_dir, scores.ar_loss / max(scores.ar_tokens, 1))
        self.world.barrier()
        return True

    def run(self, engine: Any, step: int, stop: StopRequest) -> list[EvalRow] | None:
        """Rows as in `evals/decode_speed.jsonl`, equal on all ranks; None, on all of them, when any
        was asked to stop meanwhile."""
        model = full_copy(engine, self.config, self.tokenizer.vocab_size)
        check = self._check_for(stop)
        try:
            rows = evaluate_decode_speed(
                model, self.heldout, self.settings, self.world, step, check
            )
        except EvalInterruptedError:
            return None
        if self.world.is_main and self.config.mask_token_id is not None:
            write_example(model, self.tokenizer, self.heldout, self.settings, step, self.example)
        self.world.barrier()
        return rows

    def _check_for(self, stop: StopRequest) -> Check:
        """Whether any rank was asked to stop, which all find out at the same place of the eval."""

        progress = Progress(self.say, "decode_speed")

        def check() -> None:
            progress()
            if self.world.sum([float(bool(stop))])[0]:
                raise EvalInterruptedError

        return check
