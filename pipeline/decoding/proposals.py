"""Drafts from elsewhere than the model itself: the text so far, or a smaller model.

They go through the same verification as TiDAR's, so the output follows the model alone. Sources:
prompt lookup decoding (Saxena, 2023); speculative sampling (Leviathan et al., arXiv 2211.17192).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.decoding.cache import KVCache
from pipeline.decoding.methods import LOOKUP_TOKENS
from pipeline.decoding.options import DecodeOptions
from pipeline.decoding.sampling import Sampling, Uniforms, draw
from pipeline.model.transformer import Transformer


class Proposer(Protocol):
    """Writes drafts for one request at a time."""

    count: int
    """Most tokens of a draft."""

    def start(self, seed: int) -> None:
        """A new request begins."""

    def propose(self, text: Sequence[int]) -> tuple[list[int], Tensor | None]:
        """What may follow `text`, prompt included; and q, fp32 [N, V], None for certain."""


def proposer_of(options: DecodeOptions, model: Transformer, max_tokens: int) -> Proposer | None:
    """Where the drafts of the method come from, for texts of `max_tokens`, prompts included; None
    where the model drafts itself, or nobody does."""
    if not options.traits.proposes:
        return None
    count = LOOKUP_TOKENS if options.block_size is None else options.block_size - 1
    if options.draft_model is None or options.method != "speculative":
        return PromptLookup(count)
    return DraftModel(
        options.draft_model, options.sampling, count, max_tokens, model.config.num_embeddings
    )


class PromptLookup:
    """Proposes what followed the last occurrence of the text's own last few tokens."""

    def __init__(self, count: int, longest: int = 3) -> None:
        """`longest` is the longest n-gram looked for; shorter ones are tried down to 1."""
        self.count = count
        self.longest = longest

    def start(self, seed: int) -> None:
        pass

    def propose(self, text: Sequence[int]) -> tuple[list[int], Tensor | None]:
        text = list(text)
        for length in range(min(self.longest, len(text) - 1), 0, -1):
            tail = text[-length:]
            for start in range(len(text) - length - 1, -1, -1):
                # The last token first: it settles nearly all places without a copy.
                if text[start + length - 1] == tail[-1] and text[start : start + length] == tail:
                    after = start + length
                    return text[after : after + self.count], None
        return [], None


class DraftModel:
    """Proposes what a smaller model with the same tokenizer draws, one forward a token."""

    def __init__(
        self,
        model: Transformer,
        sampling: Sampling,
        count: int,
        max_tokens: int,
        num_embeddings: int | None = None,
    ) -> None:
        """`max_tokens` is the longest text, prompt included; `num_embeddings` are the target's.

        Embeddings of one tokenizer may differ in number: padding, or a mask token that only one
        of the models has. Ids that only one of them knows are never drafted.
        """
        first = next(model.parameters())
        self.model, self.sampling, self.count = model, sampling, count
        self._target = num_embeddings or model.config.num_embeddings
        self._shared = min(self._target, model.config.num_embeddings)
        self._device = first.device
        with torch.inference_mode():
            self._cache = KVCache(
                model.config, max_tokens + count, dtype=first.dtype, device=first.device
            )
        self._forward = model.for_decoding(max_tokens + count)
        self._cached: list[int] = []
        self._uniforms = Uniforms(sampling, 1)

    def start(self, seed: int) -> None:
        self._cached = []
        self._cache.set_length(0, 0)
        self._uniforms = Uniforms(replace(self.sampling, seed=seed), 1)

    @torch.inference_mode()
    def propose(self, text: Sequence[int]) -> tuple[list[int], Tensor | None]:
        text = list(text)
        kept = 0
        while kept < min(len(self._cached), len(text) - 1) and self._cached[kept] == text[kept]:
            kept += 1
        self._cache.set_length(0, kept)
        self._cached = self._cached[:kept]
        new = text[kept:]
        drafts: list[int] = []
        rows: list[Tensor] = []
        for _ in range(self.count):
            token, row = self._next(new, [*text, *drafts])
            drafts.append(token)
            rows.append(row)
            new = [token]
        return drafts, None if self.sampling.greedy else torch.cat(rows)

    def _next(self, new: list[int], text: list[int]) -> tuple[int, Tensor]:
        """The next token and its distribution [1, V], after `new` tokens are read."""
        ids = torch.tensor([new], device=self._device).clamp_max_(
            self.model.config.num_embeddings - 1
        )
        positions = self._cache.lengths[0] + torch.arange(len(new), device=self._device)
        hidden = self._forward.hidden(ids, positions, None, self._cache)
        self._cache.keep(len(new))
        self._cached += new
        logits = self._forward.logits(hidden[0, -1:])[:, : self._shared]
        seen = None
        if self.sampling.repetition_penalty != 1:
            seen = torch.zeros_like(logits, dtype=torch.bool)
            known = [token for token in text if token < self._shared]
            seen[0, torch.tensor(known, dtype=torch.int64, device=self._device)] = True
        if self.sampling.greedy:
            return int(self.sampling.scores(logits, seen).argmax()), logits
        row = self.sampling.probabilities(logits, seen)
        row = F.pad(row, (0, self._target - self._shared))
        return int(draw(row, self._uniforms.take(1).to(self._device))), row
