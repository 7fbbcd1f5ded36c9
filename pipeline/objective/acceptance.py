"""How often drafts would be accepted on real text, position by position, without decoding.

A mask slot's distribution q and the verifier's p for the same position agree with probability
sum_v min(p_v, q_v) at temperature 1, the chance that rejection sampling keeps a draft. On real
text the earlier drafts of the block are taken as right, hence "teacher-forced".
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.data.batch import make_batch
from pipeline.data.source import Sequence
from pipeline.model.transformer import Transformer


@dataclass
class DraftScores:
    """Sums over held-out tokens; add the ranks' and divide. Positions are 1 … K - 1 in a block."""

    ar_loss: float = 0.0
    ar_tokens: int = 0
    diffusion_loss: float = 0.0
    diffusion_tokens: int = 0
    unigram_loss: float = 0.0
    """Over the same tokens as `ar_loss`."""
    drafts: Tensor | None = None
    """Scored drafts at each position, [K - 1]."""
    accepted: Tensor | None = None
    """Summed acceptance of the diffusion draft: rows greedy, temperature 1; [2, K - 1]."""
    unigram_accepted: Tensor | None = None
    """The same for a draft that knows no context, [2, K - 1]."""


@torch.inference_mode()
def score_drafts(
    model: Transformer, sequences: list[Sequence], block_size: int, unigram: Tensor
) -> DraftScores:
    """Losses and acceptance on `sequences`, one joint forward each.

    Args:
        model: in evaluation mode. Without a mask token only the AR and unigram losses are summed.
        sequences: laid out with full coverage and `block_size`.
        block_size: K.
        unigram: probabilities of a context-free draft, fp32 [V'], V' at most the model's V.
    """
    device = next(model.parameters()).device
    unigram = F.pad(unigram, (0, model.config.num_embeddings - len(unigram))).to(device)
    shape = (2, block_size - 1)
    accepted, unigram_accepted = torch.zeros(shape), torch.zeros(shape)
    scores = DraftScores(drafts=torch.zeros(block_size - 1))
    for sequence in sequences:
        _add_sequence(scores, model, sequence, unigram, accepted, unigram_accepted)
    scores.accepted, scores.unigram_accepted = accepted, unigram_accepted
    return scores


def _add_sequence(
    scores: DraftScores,
    model: Transformer,
    sequence: Sequence,
    unigram: Tensor,
    accepted: Tensor,
    unigram_accepted: Tensor,
) -> None:
    mask_token_id = model.config.mask_token_id
    num_slots = 0 if mask_token_id is None else sequence.layout.num_slots
    device = unigram.device
    length = len(sequence.tokens)
    batch = make_batch([sequence], mask_token_id or 0, num_slots).to(device)
    mask = batch.spans.dense().unsqueeze(1)
    logits = model(batch.input_ids, batch.position_ids, mask)[0].float()
    losses = F.cross_entropy(logits[batch.rows], batch.labels, reduction="none").double()
    scores.ar_loss += float(losses[: batch.ar_labels].sum())
    scores.diffusion_loss += float(losses[batch.ar_labels :].sum())
    scores.ar_tokens += batch.ar_labels
    scores.diffusion_tokens += batch.diffusion_labels
    ar_targets = batch.labels[: batch.ar_labels]
    scores.unigram_loss += float(-unigram[ar_targets].double().log().sum())

    if num_slots == 0:
        return
    slot, offset, clean = _scored_slots(sequence)
    p = torch.softmax(logits[clean.to(device)], -1)
    q = torch.softmax(logits[length + slot.to(device)], -1)
    base = unigram.expand_as(p)
    assert scores.drafts is not None
    scores.drafts.index_add_(0, offset - 1, torch.ones(len(offset)))
    for draft, sums in ((q, accepted), (base, unigram_accepted)):
        greedy = (p.argmax(-1) == draft.argmax(-1)).float().cpu()
        sampled = torch.minimum(p, draft).sum(-1).cpu()
        sums.index_add_(1, offset - 1, torch.stack([greedy, sampled]))


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
