"""How prompts are continued: all that decoding can be told, checked in one place."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from pipeline.decoding.methods import CONFIDENCE, METHODS, Method
from pipeline.decoding.sampling import Sampling
from pipeline.decoding.step import StepShape
from pipeline.decoding.text import StopStrings
from pipeline.model.transformer import Transformer
from tidar_common.errors import UserError

if TYPE_CHECKING:
    from pipeline.decoding.choice import Choice

Blocks = Sequence[int] | str | None
"""Mask blocks in a step: their numbers, None for all, or `auto`."""


@dataclass(frozen=True)
class DecodeOptions:
    """What every request of an engine has in common; raises UserError naming a key that is wrong.

    The checks that need the model are those of `step_shape`.
    """

    method: str = "tidar"
    """One of `METHODS`: `tidar`, `ar` for one token a forward, `recurrent` (the draft head alone,
    without mask blocks), `prompt_lookup` (drafts are what followed the last few tokens before),
    `speculative` (drafts of a smaller model), or `block_diffusion` (unmasking without
    verification: its text is not that of `ar`)."""
    block_size: int | None = None
    """K; None takes the one the model was trained with."""
    blocks: Blocks = None
    """Mask blocks in a step; None takes all, which of a model of linear drafts is one. `auto`
    chooses block size and blocks while decoding (`pipeline.decoding.choice`), up to the block size
    given. It changes speed and forwards; greedy output never, sampled output only in the draw, not
    its distribution."""
    sampling: Sampling = field(default_factory=Sampling)
    """How tokens are drawn; its seed is that of the first request."""
    max_new_tokens: int = 128
    eos_id: int | None = None
    """Stop after this token; None never stops early."""
    stop: StopStrings | None = None
    """Strings that end a generation; `Generation.text` is cut before them."""
    batch_size: int = 1
    """Most requests side by side."""
    prefill_chunk: int = 512
    """Most prompt tokens in one forward."""
    cuda_graphs: bool = True
    """On a GPU, capture the steps."""
    draft_model: Transformer | None = None
    """For `speculative`, a smaller model with the same tokenizer."""
    confidence: float = CONFIDENCE
    """For `block_diffusion`, the probability from which a token is kept, in (0, 1]."""
    on_choice: "Callable[[Choice], None]" = lambda choice: None
    """Called with the step that `blocks="auto"` comes to."""

    @classmethod
    def of(cls, **values: Any) -> "DecodeOptions":
        """From the fields of `Sampling` beside those of its own but `sampling`."""
        names = {item.name for item in fields(Sampling)}
        sampling = {name: values.pop(name) for name in names & values.keys()}
        return cls(sampling=Sampling(**sampling), **values)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            known = ", ".join(METHODS)
            raise UserError(f"method: unknown value {self.method!r}; known are {known}")
        for key in ("block_size", "max_new_tokens", "batch_size", "prefill_chunk"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"{key}: must be at least 1, got {value}")
        if not 0 < self.confidence <= 1:
            raise UserError(f"confidence: must be above 0 and at most 1, got {self.confidence}")
        if self.sampling.trust < 1 and self.method != "tidar":
            raise UserError(f"trust: below 1 needs method=tidar, got {self.method}")
        if self.batch_size > 1 and not self.traits.batches:
            raise UserError(f"batch_size: method={self.method} decodes one prompt at a time; use 1")
        if self.traits.proposes and self.block_size == 1:
            raise UserError(f"block_size: {self.method} needs at least 2, got 1")
        if self.method == "speculative" and self.draft_model is None:
            raise UserError("draft_model: method=speculative needs a smaller model; give one")
        if isinstance(self.blocks, str) and self.blocks != "auto":
            raise UserError(
                f"blocks: unknown value {self.blocks!r}; give numbers, auto, or none for all"
            )
        if self.chooses_step and self.sampling.trust < 1:
            raise UserError(
                "blocks: trust below 1 reads the logits of every block; leave blocks out"
            )

    @property
    def traits(self) -> Method:
        """What holds for the method."""
        return METHODS[self.method]

    @property
    def chooses_step(self) -> bool:
        """Whether the step is chosen while decoding; only TiDAR has a choice."""
        return self.blocks == "auto" and self.method == "tidar"

    def step_shape(self, model: Transformer) -> StepShape:
        """The step of the method for `model`: drafts and mask blocks for `tidar` (all of them where
        they are chosen), drafts alone for `recurrent`, a block behind the one before for
        `block_diffusion`, one token for the others.

        (Where drafts come from elsewhere, they are put behind that token step by step.)

        Raises:
            UserError: naming the key that cannot be used with this model.
        """
        if self.method == "ar" or self.traits.proposes:
            return StepShape(1)
        size = self.block_size if self.block_size is not None else model.config.block_size
        if size is None:
            raise UserError("block_size: this model has none of its own; give one")
        headed = model.draft_head is not None
        if self.traits.needs_head and not headed:
            raise UserError(
                f"method: {self.method} needs a model with a draft head; train one with "
                "model.draft_rank above 0, or use another method"
            )
        if self.traits.needs_mask and model.config.mask_token_id is None:
            raise UserError(
                "method: this model has no mask token, so it cannot draft; use method=ar"
            )
        if self.method == "recurrent":
            return StepShape(size, size, (), headed)
        if self.method == "block_diffusion":
            return StepShape.unmasking(size)
        blocks = self._blocks(model.config.linear_drafts, size)
        shape = StepShape(size, size, blocks, headed, model.config.linear_drafts)
        if self.batch_size > 1 and not headed and 1 not in blocks:
            raise UserError("blocks: a batch needs block 1, for rows that have no draft; add it")
        return shape

    def _blocks(self, linear: bool, size: int) -> tuple[int, ...]:
        """The numbers of the mask blocks in a step of `tidar` with K = `size`."""
        every = (1,) if linear else tuple(range(1, size + 1))
        if self.blocks is None or isinstance(self.blocks, str):
            return every
        chosen = tuple(sorted(set(self.blocks)))
        if linear and chosen not in ((), every):
            raise UserError(
                "blocks: this model has one block for all counts (linear drafts), got "
                f"{list(chosen)}; leave blocks out, or give none of them with []"
            )
        if not set(chosen) <= set(every):
            raise UserError(f"blocks: must be numbers in 1 … {size}, got {list(self.blocks)}")
        if self.sampling.trust < 1 and chosen != every:
            needed = "the block" if linear else "every block"
            raise UserError(f"blocks: trust below 1 reads the logits of {needed}; leave blocks out")
        return chosen
