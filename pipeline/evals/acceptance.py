"""How often drafts would be accepted on real text, position by position, without decoding.

A mask slot's distribution q and the verifier's p for the same position agree with probability
sum_v min(p_v, q_v) at temperature 1, the chance that rejection sampling keeps a draft. On real
text the earlier drafts of the block are taken as right, hence "teacher-forced". A draft is worth
something only as far as it beats `Controls`, which need no model: token frequencies, and a table of
token pairs. Letters: V vocabulary of the model, V' of the counts (V' ≤ V), P different pairs.

And how well a draft's confidence, the probability of its likeliest token, says what becomes of it:
drafts counted by confidence (Guo et al., On Calibration of Modern Neural Networks, arXiv
1706.04599).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data_prep.formats.groups import PackedSequence
from pipeline.data.batch import Batch
from pipeline.evals.scoring import Scored, pieces, row_logits, score_sequence
from pipeline.model.transformer import Transformer
from tidar_common.run_files import CalibrationRow


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


MODEL = "model"
"""The name of the model's own draft among all that are scored."""
ALONE = "recurrent"
"""That of its draft head alone, without any slot."""
BINS = 10
"""Equal parts of [0, 1]."""
ROWS = ("drafts", "confidence", "right", "verified")
"""Summed up in each bin: how many drafts, their confidence, how many have the text's token as the
likeliest, and how many the verifier's."""


@dataclass(frozen=True)
class DraftScores:
    """Sums over held-out tokens; add the ranks' and divide. Positions are 1 … K - 1 in a block."""

    ar_loss: float
    ar_tokens: int
    diffusion_loss: float
    diffusion_tokens: int
    unigram_loss: float
    """Over the same tokens as `ar_loss`."""
    drafts: Tensor
    """Scored drafts at each position, fp64 [K - 1]."""
    accepted: Mapping[str, Tensor]
    """Summed acceptance by draft: rows greedy, temperature 1; fp64 [2, K - 1]. `MODEL` is the
    model's own, others are controls, by their names. Without any sequence no name is there."""
    survived: Mapping[str, Tensor]
    """Summed chance that a draft and all before it in its block are accepted: the product of their
    acceptances. Names and rows as in `accepted`, fp64 [2, K - 1]."""
    calibration: Tensor
    """The model's drafts by confidence, `ROWS` in each bin, fp64 [4, BINS]."""

    @classmethod
    def zero(cls, block_size: int) -> "DraftScores":
        none = torch.zeros(block_size - 1, dtype=torch.float64)
        return cls(0.0, 0, 0.0, 0, 0.0, none, {}, {}, empty_bins())

    def __add__(self, other: "DraftScores") -> "DraftScores":
        return DraftScores(
            **{f.name: _added(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        )


def _added(left: Any, right: Any) -> Any:
    """The sum, by name where there are names; a side that lacks one adds nothing to it."""
    if not isinstance(left, Mapping):
        return left + right
    sides = (left, right)
    return {name: sum(side[name] for side in sides if name in side) for name in left | right}


@torch.inference_mode()
def score_drafts(
    model: Transformer,
    sequences: Iterable[PackedSequence],
    block_size: int,
    controls: Controls,
    first: int = 0,
) -> DraftScores:
    """Losses and acceptance on `sequences`, one joint forward each.

    Args:
        model: in evaluation mode. Without a mask token only the AR and unigram losses are summed.
        sequences: laid out with full coverage and `block_size`.
        block_size: K.
        controls: the drafts to score beside the model's own.
        first: as for `score_sequence`.
    """
    controls = controls.on(model)
    total = DraftScores.zero(block_size)
    for sequence in sequences:
        scored = score_sequence(model, sequence, block_size, first)
        total = total + drafts_of(model, scored, block_size, controls)
    return total


@torch.inference_mode()
def drafts_of(
    model: Transformer, scored: Scored, block_size: int, controls: Controls
) -> DraftScores:
    """The sums of one sequence whose joint forward is `scored`; `controls` as `on` gives them."""
    batch = scored.batch
    drafts, accepted, survived, calibration = _acceptance(model, scored, block_size, controls)
    labels = batch.labels[: batch.ar_labels]
    return DraftScores(
        ar_loss=float(scored.ar_losses.sum()),
        ar_tokens=batch.ar_labels,
        diffusion_loss=float(scored.diffusion_losses.sum()),
        diffusion_tokens=batch.diffusion_labels,
        unigram_loss=float(-controls.unigram[labels].double().log().sum()),
        drafts=drafts,
        accepted=accepted,
        survived=survived,
        calibration=calibration,
    )


def _acceptance(
    model: Transformer, scored: Scored, block_size: int, controls: Controls
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], Tensor]:
    """`drafts`, `accepted`, `survived` and `calibration` of `DraftScores` for one sequence."""
    drafters = (MODEL,) if scored.drafts is None else (MODEL, ALONE)
    names = (*drafters, *controls.names)
    drafts = torch.zeros(block_size - 1, dtype=torch.float64)
    if scored.batch.diffusion_labels == 0:
        nothing = dict.fromkeys(names, drafts.expand(2, -1))
        return drafts, nothing, nothing, empty_bins()
    rows = ScoredRows.of(scored.batch)
    place = rows.place.cpu()
    drafts = drafts.index_add(0, place - 1, torch.ones(len(place), dtype=torch.float64))
    # Greedy and sampled acceptance of each scored place, by draft.
    rates = {name: torch.zeros(2, len(place), dtype=torch.float64) for name in names}
    confidence, right = torch.zeros(2, len(place), dtype=torch.float64)
    text = scored.batch.input_ids[0]
    for part in pieces(len(place)):
        verifier = rows.verifier[part]
        p = torch.softmax(model.lm_head(scored.hidden[verifier]).float(), -1)
        own_draft = torch.softmax(_logits(model, scored, rows.slot[part]).float(), -1)
        # The row that verifies a place is that of the token before it.
        distributions = [(MODEL, own_draft), *controls.drafts(text[verifier])]
        if scored.drafts is not None:
            logits = model.draft_logits(scored.drafts, rows.alone[part])
            distributions.append((ALONE, torch.softmax(logits.float(), -1)))
        for name, draft in distributions:
            rates[name][:, part] = _agreement(p, draft)
        likeliest = own_draft.max(-1)
        confidence[part] = likeliest.values.double().cpu()
        right[part] = (likeliest.indices == text[verifier + 1]).double().cpu()
    # One row a block; a place that a short block lacks stays 0 and so counts nothing.
    block, count = rows.block.cpu(), len(scored.batch.blocks.slots)
    accepted, survived = {}, {}
    for name, values in rates.items():
        by_block = torch.zeros(2, count, block_size - 1, dtype=torch.float64)
        by_block[:, block, place - 1] = values
        accepted[name], survived[name] = by_block.sum(1), by_block.cumprod(2).sum(1)
    calibration = binned(confidence, right, verified=rates[MODEL][0])
    return drafts, accepted, survived, calibration


def _logits(model: Transformer, scored: Scored, rows: Tensor) -> Tensor:
    return row_logits(model, scored.hidden, scored.drafts, rows)


def _agreement(p: Tensor, q: Tensor) -> Tensor:
    """Greedy and sampled acceptance of drafts from `q` by the verifier's `p`, [N, V]; [2, N]."""
    greedy = (p.argmax(-1) == q.argmax(-1)).double()
    return torch.stack([greedy, torch.minimum(p, q).sum(-1).double()]).cpu()


@dataclass(frozen=True)
class ScoredRows:
    """Places that decoding would draft: those from 1 on of blocks with text before them. (Decoding
    always has a token before a block, and the verifier fills place 0.) int64 [N] each."""

    block: Tensor
    place: Tensor
    slot: Tensor
    """Row of the slot."""
    alone: Tensor
    """Row of the draft of the head alone, where every block is drafted so, too."""
    verifier: Tensor
    """The clean row whose logits verify the place."""

    @classmethod
    def of(cls, batch: Batch) -> "ScoredRows":
        """Of a batch of one sequence."""
        blocks = batch.blocks
        used = blocks.there & (blocks.starts >= 0)[:, None]
        used[:, 0] = False
        block, place = used.nonzero(as_tuple=True)
        order = torch.searchsorted(blocks.alone, block)
        return cls(
            block=block,
            place=place,
            slot=blocks.slots[block, place],
            alone=batch.input_ids.numel() + order * blocks.slots.shape[1] + place,
            verifier=blocks.starts[block] + place,
        )


def empty_bins() -> Tensor:
    """Sums of no drafts, fp64 [4, BINS]; sums of several parts add up."""
    return torch.zeros(len(ROWS), BINS, dtype=torch.float64)


def binned(confidence: Tensor, right: Tensor, verified: Tensor) -> Tensor:
    """`ROWS` by bin, fp64 [4, BINS], of drafts with these values, fp64 [N] each."""
    number = (confidence * BINS).long().clamp(max=BINS - 1)
    values = torch.stack([torch.ones_like(confidence), confidence, right, verified])
    return empty_bins().index_add_(1, number, values)


def describe_calibration(bins: Tensor) -> CalibrationRow:
    """Shares by bin, None where a bin has no draft, and the expected calibration error; the keys
    of `docs/evals.md`. None for no drafts at all."""
    drafts, confidence, right, _ = bins
    total = float(drafts.sum())
    if not total:
        return CalibrationRow(draft_calibration=None, draft_calibration_error=None)
    counts = [int(count) for count in drafts.tolist()]
    shares = {
        name: [s / n if n else None for s, n in zip(sums.tolist(), counts, strict=True)]
        for name, sums in zip(ROWS[1:], bins[1:], strict=True)
    }
    error = float((confidence - right).abs().sum()) / total
    return CalibrationRow(
        draft_calibration={"drafts": list(counts), **shares}, draft_calibration_error=error
    )
