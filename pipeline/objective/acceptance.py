"""How often drafts would be accepted on real text, position by position, without decoding.

A mask slot's distribution q and the verifier's p for the same position agree with probability
sum_v min(p_v, q_v) at temperature 1, the chance that rejection sampling keeps a draft. On real
text the earlier drafts of the block are taken as right, hence "teacher-forced".
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.data.source import Sequence
from pipeline.model.transformer import Transformer
from pipeline.objective.calibration import binned, empty_bins
from pipeline.objective.scoring import Scored, pieces, score_sequence


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
    accepted: Tensor
    """Summed acceptance of the diffusion draft: rows greedy, temperature 1; fp64 [2, K - 1]."""
    survived: Tensor
    """Summed chance that a draft and all before it in its block are accepted: the product of their
    acceptances. Rows as in `accepted`, fp64 [2, K - 1]."""
    unigram_accepted: Tensor
    """As `accepted`, for a draft that knows no context, fp64 [2, K - 1]."""
    unigram_survived: Tensor
    """As `survived`, for that draft, fp64 [2, K - 1]."""
    calibration: Tensor
    """The same drafts by confidence, `calibration.ROWS` in each bin, fp64 [4, BINS]."""

    @classmethod
    def zero(cls, block_size: int) -> "DraftScores":
        rates = torch.zeros(2, block_size - 1, dtype=torch.float64)
        return cls(0.0, 0, 0.0, 0, 0.0, rates[0], rates, rates, rates, rates, empty_bins())

    def __add__(self, other: "DraftScores") -> "DraftScores":
        return DraftScores(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        )


@torch.inference_mode()
def score_drafts(
    model: Transformer, sequences: Iterable[Sequence], block_size: int, unigram: Tensor
) -> DraftScores:
    """Losses and acceptance on `sequences`, one joint forward each.

    Args:
        model: in evaluation mode. Without a mask token only the AR and unigram losses are summed.
        sequences: laid out with full coverage and `block_size`.
        block_size: K.
        unigram: probabilities of a context-free draft, [V'], V' at most the model's V.
    """
    unigram = unigram_draft(model, unigram)
    total = DraftScores.zero(block_size)
    for sequence in sequences:
        scored = score_sequence(model, sequence)
        total = total + drafts_of(model, sequence, scored, block_size, unigram)
    return total


def unigram_draft(model: Transformer, unigram: Tensor) -> Tensor:
    """`unigram` [V'] over all tokens of `model`, on its device; fp32 [V]."""
    spare = model.config.num_embeddings - len(unigram)
    if spare < 0:
        raise ValueError(f"the unigram draft has {-spare} tokens more than the model")
    return F.pad(unigram.float(), (0, spare)).to(next(model.parameters()).device)


@torch.inference_mode()
def drafts_of(
    model: Transformer, sequence: Sequence, scored: Scored, block_size: int, unigram: Tensor
) -> DraftScores:
    """The sums of one sequence whose joint forward is `scored`; `unigram` by `unigram_draft`."""
    batch = scored.batch
    drafts, accepted, survived, calibration = _acceptance(
        model, sequence, scored, block_size, unigram
    )
    return DraftScores(
        ar_loss=float(scored.ar_losses.sum()),
        ar_tokens=batch.ar_labels,
        diffusion_loss=float(scored.diffusion_losses.sum()),
        diffusion_tokens=batch.diffusion_labels,
        unigram_loss=float(-unigram[batch.labels[: batch.ar_labels]].double().log().sum()),
        drafts=drafts,
        accepted=accepted[0],
        survived=survived[0],
        unigram_accepted=accepted[1],
        unigram_survived=survived[1],
        calibration=calibration,
    )


def _acceptance(
    model: Transformer, sequence: Sequence, scored: Scored, block_size: int, unigram: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`drafts` [K - 1], `accepted`, `survived` and `calibration` of `DraftScores` for one sequence,
    the middle two [2, 2, K - 1]: of the model's own draft, then of the unigram's."""
    drafts = torch.zeros(block_size - 1, dtype=torch.float64)
    nothing = drafts.expand(2, 2, -1)
    if scored.batch.diffusion_labels == 0:
        return drafts, nothing, nothing, empty_bins()
    slot, offset, clean = _scored_slots(sequence)
    drafts = drafts.index_add(0, offset - 1, torch.ones(len(offset), dtype=torch.float64))
    clean_hidden = scored.hidden[: len(sequence.tokens)]
    slot_hidden = scored.hidden[len(sequence.tokens) :]
    # Greedy and sampled acceptance of each slot, of the model's own draft and the unigram's.
    rates = torch.zeros(2, 2, len(slot), dtype=torch.float64)
    confidence, right = torch.zeros(2, len(slot), dtype=torch.float64)
    labels = scored.batch.labels[scored.batch.ar_labels :].cpu()[slot]
    for part in pieces(len(slot)):
        device = unigram.device
        p = torch.softmax(model.lm_head(clean_hidden[clean[part].to(device)]).float(), -1)
        q = torch.softmax(model.lm_head(slot_hidden[slot[part].to(device)]).float(), -1)
        for rate, draft in zip(rates, (q, unigram.expand_as(p)), strict=True):
            rate[0, part] = (p.argmax(-1) == draft.argmax(-1)).double().cpu()
            rate[1, part] = torch.minimum(p, draft).sum(-1).double().cpu()
        likeliest = q.max(-1)
        confidence[part] = likeliest.values.double().cpu()
        right[part] = (likeliest.indices.cpu() == labels[part]).double()
    # One row a block; a place that a short block lacks stays 0 and so counts nothing.
    block = torch.from_numpy(sequence.layout.slot_block.astype("int64"))[slot]
    by_block = torch.zeros(2, 2, sequence.layout.num_blocks, block_size - 1, dtype=torch.float64)
    by_block[:, :, block, offset - 1] = rates
    calibration = binned(confidence, right, verified=rates[0, 0])
    return drafts, by_block.sum(2), by_block.cumprod(3).sum(2), calibration


def _scored_slots(sequence: Sequence) -> tuple[Tensor, Tensor, Tensor]:
    """Slots that decoding would use as drafts: slot index, place 1 … K - 1 in its block, and the
    clean row whose logits verify it; int64 [N] each.

    Blocks at a document's start are left out: decoding always has a token before a block. So are
    first places: the verifier fills them.
    """
    layout = sequence.layout
    block = layout.slot_block
    slots = torch.arange(layout.num_slots)
    offset = torch.from_numpy((layout.slot_position - layout.prefix_end[block]).astype("int64"))
    has_prefix = torch.from_numpy((layout.prefix_end > layout.prefix_start)[block])
    used = has_prefix & (offset >= 1)
    position = torch.from_numpy(layout.slot_position.astype("int64"))
    return slots[used], offset[used], position[used] - 1
