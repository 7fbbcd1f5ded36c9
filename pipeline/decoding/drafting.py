"""From a step's hidden states to the draft that the next one verifies.

Without a draft head the places of a block are drawn independently, all at once. With one they are
drawn in order, each knowing those before (`pipeline.model.draft_head`); a row whose block is not
in the step is drafted all the same. Whatever draws them, verification needs the distribution that
each token was drawn from, and the output is then the verifier's. Nothing here waits for the device.
Letters: b rows, K block size, E hidden size, V vocabulary, P and w as in the head.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.decoding.sampling import Sampling, draw
from pipeline.model.draft_head import DraftHead
from pipeline.model.transformer import Transformer

TABLE_ELEMENTS = 2**24
"""What the head makes of each token's embedding is kept as a table up to this size."""


@dataclass(frozen=True)
class Draft:
    """Tokens d_1 … d_{K-1}, and what they were drawn from."""

    tokens: Tensor
    """int64 [b, K - 1]"""
    probabilities: Tensor | None
    """q, fp32 [b, K - 1, V]; None when greedy."""
    logits: Tensor | None
    """[b, K - 1, V]; None unless asked for."""


@dataclass(frozen=True)
class Behind:
    """What a step leaves of some rows, of which their drafts are made."""

    row: Tensor
    """Hidden state of the row that drew d_0, [b, E]."""
    block: Tensor | None
    """Those of the block for it, [b, K, E]; None where no row has one."""
    there: Tensor | None
    """Which rows have one, bool [b]; None is all."""
    current: Tensor
    """d_0, int64 [b, 1]."""
    seen: Tensor | None
    """Tokens so far, d_0 among them, bool [b, V]; only for a repetition penalty."""
    uniforms: Tensor | None
    """fp64 [b, K - 1]; None is greedy."""
    logits: Tensor | None = None
    """Of the block's slots but the first, [b, K - 1, V], where they are known already."""


class Drafter:
    """Draws drafts for a model and sampling settings."""

    def __init__(
        self, model: Transformer, logits: Callable[[Tensor], Tensor], sampling: Sampling
    ) -> None:
        """`logits` is the LM head, [..., E] to [..., V]."""
        self.model, self.logits, self.sampling = model, logits, sampling
        self.keeps_logits = sampling.trust < 1
        self._table: Tensor | None = None
        self._none: Tensor | None = None
        """What the cell adds up where there is no slot, [1, 1, P]."""
        head = model.draft_head
        if head is not None:
            self._none = head.slot_parts(head.no_slot)[None, None]
            embedding = model.model.embed_tokens.weight
            width = head.token_parts(embedding[:1]).shape[-1]
            if embedding.shape[0] * width <= TABLE_ELEMENTS:
                self._table = head.token_parts(embedding)

    def draw(self, size: int, behind: Behind) -> Draft:
        """The draft of K - 1 tokens, with K = `size`, for the rows of `behind`."""
        if self.model.draft_head is None:
            assert behind.block is not None, "without a head drafts come from blocks"
            return self._at_once(behind.block, behind)
        return self._in_order(self.model.draft_head, size, behind)

    def _at_once(self, block: Tensor, behind: Behind) -> Draft:
        """A block's first slot stands where the verifier's own token goes: nothing is drawn there.
        The penalty knows the tokens up to d_0, and not a draft's own neighbours."""
        logits = self.logits(block[:, 1:]) if behind.logits is None else behind.logits
        seen = None if behind.seen is None else behind.seen[:, None]
        tokens, probabilities = self._choose(logits, seen, behind.uniforms)
        return Draft(tokens, probabilities, logits if self.keeps_logits else None)

    def _in_order(self, head: DraftHead, size: int, behind: Behind) -> Draft:
        state, plain = head.first(behind.row)
        base, parts = self._bases(head, behind, plain)
        base = base.expand(-1, size - 1, -1)
        parts = parts.expand(len(behind.current), size - 1, -1)
        tokens, rows, kept = [], [], []
        before, seen = behind.current[:, 0], behind.seen
        for place in range(size - 1):
            z, state = head.cell.step(parts[:, place] + self._token_parts(head, before), state)
            logits = base[:, place] + head.up(z)
            uniform = None if behind.uniforms is None else behind.uniforms[:, place]
            before, probabilities = self._choose(logits, seen, uniform)
            tokens.append(before)
            kept.append(logits)
            if probabilities is not None:
                rows.append(probabilities)
            if seen is not None:
                seen = seen.scatter(1, before[:, None], True)
        return Draft(
            torch.stack(tokens, 1),
            torch.stack(rows, 1) if rows else None,
            torch.stack(kept, 1) if self.keeps_logits else None,
        )

    def _bases(self, head: DraftHead, behind: Behind, plain: Tensor) -> tuple[Tensor, Tensor]:
        """What does not depend on the draft: logits [b, K - 1 or 1, V] under the LM head, and the
        cell's inputs [b or 1, K - 1 or 1, P]."""
        plain, none = plain[:, None], self._none
        assert none is not None, "made with the head"
        if behind.block is None:
            return self.logits(plain), none
        slots = behind.block[:, 1:]
        parts = head.slot_parts(slots)
        if behind.there is not None:
            there = behind.there[:, None, None]
            slots, parts = torch.where(there, slots, plain), torch.where(there, parts, none)
        return self.logits(slots), parts

    def _token_parts(self, head: DraftHead, tokens: Tensor) -> Tensor:
        """The cell's inputs [b, P] from the tokens before a place [b]."""
        if self._table is not None:
            return self._table[tokens]
        return head.token_parts(self.model.model.embed_tokens(tokens))

    def _choose(
        self, logits: Tensor, seen: Tensor | None, uniforms: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """A token for each row of logits [..., V], and q where it is drawn."""
        if uniforms is None:
            return self.sampling.scores(logits, seen).argmax(-1), None
        probabilities = self.sampling.probabilities(logits, seen)
        return draw(probabilities, uniforms), probabilities
