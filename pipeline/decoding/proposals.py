"""Drafts from elsewhere than the model itself: the text so far, or a smaller model.

They go through the same verification as TiDAR's, so the output follows the model alone. Sources:
prompt lookup decoding (Saxena, 2023); speculative sampling (Leviathan et al., arXiv 2211.17192).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from data_prep.errors import UserError
from pipeline.decoding.cache import KVCache
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
    """Proposes what a smaller model with the same tokens draws, one forward a token."""

    def __init__(self, model: Transformer, sampling: Sampling, count: int, max_tokens: int) -> None:
        """`max_tokens` is the longest text, prompt included."""
        first = next(model.parameters())
        self.model, self.sampling, self.count = model, sampling, count
        self._device = first.device
        with torch.inference_mode():
            self._cache = KVCache(
                model.config, max_tokens + count, dtype=first.dtype, device=first.device
            )
        self._cached: list[int] = []
        self._uniforms = Uniforms(sampling, 1)

    def check(self, target: Transformer) -> None:
        """Raise UserError unless the two models have the same tokens."""
        own, other = self.model.config.num_embeddings, target.config.num_embeddings
        if own != other:
            raise UserError(
                f"draft_model: has {own} embeddings, the model has {other}; give one that was "
                "trained with the same tokenizer"
            )

    def start(self, seed: int) -> None:
        self._cached = []
        self._cache.length = 0
        self._uniforms = Uniforms(replace(self.sampling, seed=seed), 1)

    @torch.inference_mode()
    def propose(self, text: Sequence[int]) -> tuple[list[int], Tensor | None]:
        text = list(text)
        kept = 0
        while kept < min(len(self._cached), len(text) - 1) and self._cached[kept] == text[kept]:
            kept += 1
        self._cache.length = kept
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
        ids = torch.tensor([new], device=self._device)
        positions = self._cache.length + torch.arange(len(new), device=self._device)
        hidden = self.model.hidden(ids, positions, cache=self._cache)
        self._cache.keep(len(new))
        self._cached += new
        logits = self.model.lm_head(hidden[0, -1:])
        seen = None
        if self.sampling.repetition_penalty != 1:
            seen = torch.zeros_like(logits, dtype=torch.bool)
            seen[0, torch.tensor(text, device=self._device)] = True
        if self.sampling.greedy:
            return int(self.sampling.scores(logits, seen).argmax()), logits
        row = self.sampling.probabilities(logits, seen)
        return int(draw(row, self._uniforms.take(1).to(self._device))), row
