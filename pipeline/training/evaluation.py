"""The periodic decode-speed eval inside training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.tokenizers.load import load_tokenizer
from pipeline.checkpoint.retention import eval_losses
from pipeline.distributed import World
from pipeline.evals.decode_speed import evaluate_decode_speed, write_example
from pipeline.evals.drafting import score_heldout
from pipeline.evals.heldout import HeldOut
from pipeline.evals.settings import Check, EvalInterruptedError
from pipeline.model.config import ModelConfig
from pipeline.training.engine import full_copy
from pipeline.training.guards.ar_guard import write_base
from pipeline.training.launch.signals import StopRequest
from pipeline.training.settings import TrainSettings
from tidar_common.errors import UserError
from tidar_common.run_files import EvalRow


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
        self.heldout = HeldOut(settings.data_dir, settings.manifest, settings.mix)
        self.tokenizer = load_tokenizer(settings.data_dir)
        self.run_dir = settings.run_dir
        self.init_from = settings.init_from
        self.example: Path = settings.run_dir / "evals" / "example.json"
        self._check()
        for line in self.heldout.shortages(self.settings):
            say(f"warning: {line}")

    def _check(self) -> None:
        """Find out before the first step, not at the first eval, what could not be decoded."""
        longest = self.settings.prompt_tokens + self.settings.max_new_tokens
        if longest > self.config.max_positions:
            raise UserError(
                f"evals.decode_speed.max_new_tokens: {self.settings.prompt_tokens} prompt tokens "
                f"and {self.settings.max_new_tokens} new ones exceed the model's "
                f"{self.config.max_positions} positions; shorten one of them"
            )
        self.heldout.prompts(1, self.settings.prompt_tokens, self.settings.seed)

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
        model = full_copy(engine, self.config, self.tokenizer.vocab_size)
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

        def check() -> None:
            if self.world.sum([float(bool(stop))])[0]:
                raise EvalInterruptedError

        return check
