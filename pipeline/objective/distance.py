"""Distances between a draft's distribution q and a teacher's distribution p of the same position.

    kl          KL(p || q)
    tv          TV(p, q) = 1 - sum_v min(p_v, q_v), the chance that decoding rejects the draft
    acceptance  -log sum_v min(p_v, q_v)
    blend       lambda · KL + (1 - lambda) · TV, lambda = exp(-3 · sum_v min(p_v, q_v))

The last two are LK losses (arXiv 2602.23881): where p and q hardly overlap TV has next to no
gradient, and `acceptance` divides by what it lacks, while `blend` starts as KL and becomes TV as
drafts get better. p is taken as given, and so is lambda, a number of each row.
All four have the gradient c_kl · (q - p) + c_tv · q · (s - sum_v q_v s_v) over the logits of q,
s_v being -1 where q_v < p_v and else 0, with coefficients of their own.
Letters: n rows, V vocabulary.
"""

import torch
from torch import Tensor

BLEND_DECAY = 3.0
"""How fast lambda falls with the overlap."""


def coefficients(agreement: str, overlap: Tensor) -> tuple[Tensor, Tensor]:
    """c_kl and c_tv of each row, [n], given sum_v min(p_v, q_v) [n]."""
    one, none = torch.ones_like(overlap), torch.zeros_like(overlap)
    if agreement == "kl":
        return one, none
    if agreement == "tv":
        return none, one
    if agreement == "acceptance":
        return none, 1 / _positive(overlap)
    blended = torch.exp(-BLEND_DECAY * overlap)
    return blended, 1 - blended


def distances(agreement: str, overlap: Tensor, divergence: Tensor) -> Tensor:
    """The distance of each row, [n], given sum_v min(p_v, q_v) and KL(p || q), [n] each."""
    if agreement == "acceptance":
        return -_positive(overlap).log()
    kl, tv = coefficients(agreement, overlap)
    return kl * divergence + tv * (1 - overlap)


def slope_(
    draft: Tensor, expected: Tensor, kl: Tensor | None, tv: Tensor | None, factor: Tensor
) -> Tensor:
    """`factor` [n] times the gradient over the logits, [n, V].

    Args:
        draft: q, [n, V].
        expected: p, [n, V]; overwritten.
        kl: c_kl, [n]; None is 0.
        tv: c_tv, [n]; None is 0.
        factor: of each row.
    """
    total = None
    if tv is not None:
        total = (draft < expected).to(draft.dtype).neg_()
        inner = (draft * total).sum(1, keepdim=True)
        # q first: both are as small as the overlap, by which c_tv may divide.
        total.sub_(inner).mul_(draft).mul_(tv[:, None]).mul_(factor[:, None])
    if kl is not None:
        difference = expected.neg_().add_(draft).mul_((kl * factor)[:, None])
        total = difference if total is None else total.add_(difference)
    assert total is not None
    return total


def _positive(overlap: Tensor) -> Tensor:
    return overlap.clamp(min=torch.finfo(overlap.dtype).tiny)
