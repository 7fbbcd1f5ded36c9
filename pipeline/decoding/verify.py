"""Rejection sampling: keep drafts so that the output is distributed as the target says.

Leviathan et al., *Fast Inference from Transformers via Speculative Decoding* (2023), with p the
target (verifier) and q the draft distribution; TiDAR (arXiv 2511.08923), section 3.2. Rows of a
batch are independent. Nothing waits for the device. Letters: B rows, N drafts, V vocabulary.
"""

import torch
from torch import Tensor

from pipeline.decoding.sampling import draw


def verify(
    drafts: Tensor,
    draft_probabilities: Tensor,
    target: Tensor,
    uniform: Tensor,
    limit: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Accept drafts from the left, then draw the token after the last accepted one.

    Draft i is accepted with probability min(1, p_i / q_i); at the first rejection the token comes
    from the normalised positive part of p - q, after the last draft from p itself.

    Args:
        drafts: token ids, int64 [B, N].
        draft_probabilities: q, the distributions the drafts were drawn from, [B, N, V].
        target: p for the same N positions and the one after them, [B, N + 1, V].
        uniform: fp64 [B, N + 1], one number for each decision and one for the drawn token.
        limit: int64 [B], how many of a row's drafts count; None means all N.

    Returns:
        The number of accepted drafts, int64 [B], and the tokens drawn after them, int64 [B].
    """
    count = drafts.shape[1]
    if count == 0:
        return torch.zeros_like(uniform[:, 0], dtype=torch.int64), draw(target[:, 0], uniform[:, 0])
    column = drafts[..., None]
    p = target[:, :count].gather(2, column).squeeze(2)
    q = draft_probabilities.gather(2, column).squeeze(2)
    # u < p / q without the division; a draft has q > 0, or it would not have been drawn.
    good = uniform[:, :count] * q < p
    accepted = _accepted(good, limit)
    corrected = accepted < (count if limit is None else limit)
    p_row = _row(target, accepted)
    q_row = _row(draft_probabilities, accepted.clamp_max(count - 1))
    rest = (p_row - q_row).clamp_min_(0.0)
    # When p and q agree to the last bit, p is all that is left to draw from.
    corrected = corrected & (rest.sum(-1) > 0)
    weights = torch.where(corrected[:, None], rest, p_row)
    return accepted, draw(weights, uniform[:, count])


def verify_greedy(
    drafts: Tensor, best: Tensor, limit: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same for one-hot rows: accept while the draft is the target's argmax.

    Args:
        drafts: int64 [B, N].
        best: the target's argmax at each position, int64 [B, N + 1].
        limit: as in `verify`.
    """
    if drafts.shape[1] == 0:
        return torch.zeros_like(best[:, 0]), best[:, 0]
    accepted = _accepted(drafts == best[:, :-1], limit)
    return accepted, best.gather(1, accepted[:, None]).squeeze(1)


def _accepted(good: Tensor, limit: Tensor | None) -> Tensor:
    """How many of the leading entries of each row of `good` [B, N] are true, at most `limit`."""
    accepted = good.long().cumprod(1).sum(1)
    return accepted if limit is None else torch.minimum(accepted, limit)


def _row(table: Tensor, index: Tensor) -> Tensor:
    """Row `index[b]` of `table[b]`: [B, N, V] and [B] to [B, V]."""
    return table[torch.arange(len(table), device=table.device), index]
