"""Watches the mask token's embedding, the one weight that every draft starts from.

It is read off the forward pass: the last row of a joint forward is always a mask slot, and an
embedding that slots have for themselves is whole while the decoder runs. So nothing is gathered
under ZeRO 3 and nothing waits for the device before the step does.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.model.transformer import Decoder
from pipeline.training.config import MaskGuardConfig
from pipeline.training.moments import Guard, make_event
from pipeline.training.step import StepDone


@dataclass(frozen=True)
class MaskNorm:
    """Of the mask token's embedding, as the last forward used it."""

    norm: float
    text: float
    """Mean norm over the text tokens of one sequence of that forward."""

    @property
    def share(self) -> float:
        return self.norm / self.text if self.text else float("inf")


class MaskEmbedding(Guard):
    """Looks at every training forward of a model with a mask token."""

    def __init__(
        self, decoder: Decoder, mask_token_id: int | None, config: MaskGuardConfig
    ) -> None:
        self.config = config
        self._decoder = decoder
        self._mask_token_id = mask_token_id
        self._seen: tuple[Tensor, Tensor] | None = None
        self._read: MaskNorm | None = None
        self._expected = False
        self._outside = False
        if mask_token_id is not None:
            # A draft head embeds tokens, too, but behind the decoder.
            decoder.register_forward_pre_hook(self._expect)
            decoder.embed_tokens.register_forward_hook(self._look)

    def after_step(self, done: StepDone) -> None:
        mask = self.read() if done.result.applied else None
        if mask is not None and (text := self.left(mask)):
            self.report(
                make_event("mask_embedding", done.step, text, norm=mask.norm, share=mask.share)
            )

    def read(self) -> MaskNorm | None:
        """The last forward's; None without a mask section. Waits for the device."""
        if self._seen is not None:
            self._read, self._seen = MaskNorm(*(float(value) for value in self._seen)), None
        return self._read

    @property
    def norm(self) -> float | None:
        """The last forward's, of the mask token's embedding; None without a mask section."""
        mask = self.read()
        return mask.norm if mask is not None else None

    def left(self, mask: MaskNorm) -> str | None:
        """What to tell when the norm has just left its bounds, and not again before it was back."""
        was_outside = self._outside
        low, high = self.config.least_share, self.config.most_share
        self._outside = not low <= mask.share <= high
        if was_outside or not self._outside:
            return None
        bound, key = (low, "least_share") if mask.share < low else (high, "most_share")
        return (
            f"the mask token's embedding has norm {mask.norm:.3g}, {mask.share:.3g} of the "
            f"text's {mask.text:.3g}, beyond mask_guard.{key}={bound:g}: drafts start from it; "
            "look at optimizer.learning_rate and weight_decay"
        )

    def _expect(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._expected = True

    def _look(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if not self._expected:
            return
        self._expected = False
        is_text = inputs[0][0] != self._mask_token_id
        norms = torch.linalg.vector_norm(output.detach()[0], dim=-1, dtype=torch.float32)
        # A mean by hand: picking rows out would wait for the device to count them.
        text = (norms * is_text).sum() / is_text.sum().clamp(min=1)
        embedding = self._decoder.mask_embedding
        norm = norms[-1] if embedding is None else embedding.detach().float().norm()
        self._seen = norm, text
