"""Drafts that need no model: what token frequencies, and a table of token pairs, would draft.

A draft is worth something only as far as it beats these. Letters: V vocabulary of the model, V' of
the counts (V' ≤ V), P different pairs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.model.transformer import Transformer


@dataclass(frozen=True)
class PairCounts:
    """How often tokens follow each other, row by row of a sparse table [V', V']."""

    starts: Tensor
    """Where the successors of each token start, and behind them where the last ones end; int64
    [V' + 1]."""
    successors: Tensor
    """Those of a token in ascending order, int32 [P]."""
    counts: Tensor
    """How often each was seen behind its token, int32 [P]."""

    @classmethod
    def from_keys(cls, keys: Tensor, vocabulary: int) -> "PairCounts":
        """Count pairs (u, v), each given as `u · vocabulary + v`; int64 of any length."""
        pairs, counts = torch.unique(keys, return_counts=True)
        first = torch.div(pairs, vocabulary, rounding_mode="floor")
        starts = torch.zeros(vocabulary + 1, dtype=torch.int64)
        starts[1:] = torch.bincount(first, minlength=vocabulary).cumsum(0)
        return cls(starts, (pairs - first * vocabulary).int(), counts.int())


@dataclass(frozen=True)
class Controls:
    """The drafts that stand beside a model's own, and their names."""

    unigram: Tensor
    """Probabilities that know no context, [V']; after `on`, fp32 [V]."""
    pairs: PairCounts | None = None
    """Of the bigram draft; None leaves it out."""

    def on(self, model: Transformer) -> "Controls":
        """The same over all tokens of `model`, on its device.

        Raises:
            ValueError: when they have more tokens than the model.
        """
        spare = model.config.num_embeddings - len(self.unigram)
        if spare < 0:
            raise ValueError(f"the unigram draft has {-spare} tokens more than the model")
        device = next(model.parameters()).device
        unigram = F.pad(self.unigram.float(), (0, spare)).to(device)
        pairs = self.pairs
        if pairs is not None:
            pairs = PairCounts(
                pairs.starts.to(device), pairs.successors.to(device), pairs.counts.to(device)
            )
        return replace(self, unigram=unigram, pairs=pairs)

    @property
    def names(self) -> tuple[str, ...]:
        return ("unigram",) if self.pairs is None else ("unigram", "bigram")

    def drafts(self, before: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Each draft's name and its distributions at places behind the tokens `before` [N]; [N, V].
        One after the other, for each may be as large as a batch of logits."""
        yield "unigram", self.unigram.expand(len(before), -1)
        if self.pairs is not None:
            yield "bigram", self.bigram(self.pairs, before)

    def bigram(self, pairs: PairCounts, before: Tensor) -> Tensor:
        """Distributions behind the tokens `before` [N], fp32 [N, V]; only these rows are built.

        Counts interpolated with the unigram, q(v | u) = (c(u, v) + t(u) q(v)) / (c(u) + t(u)), c(u)
        the sum and t(u) the number of different successors of u: Witten and Bell (1991), as written
        by Chen and Goodman (1998). A token that nothing followed gets the unigram.
        """
        before = before.long()
        start = pairs.starts[before]
        kinds = pairs.starts[before + 1] - start
        row = torch.repeat_interleave(torch.arange(len(before), device=before.device), kinds)
        inside = torch.arange(len(row), device=row.device) - (kinds.cumsum(0) - kinds)[row]
        entry = start[row] + inside
        seen = pairs.counts[entry].float()
        total = torch.zeros(len(before), device=before.device).index_add_(0, row, seen) + kinds
        # Behind a token without successors the unigram alone is left.
        share = torch.where(kinds > 0, kinds / total.clamp(min=1), 1.0)
        rows = self.unigram * share[:, None]
        column = pairs.successors[entry].long()
        rows[row, column] += seen / total[row]
        return rows
