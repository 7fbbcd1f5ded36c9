"""Weights of a block's places by the prefix of drafts that would be accepted.

Decoding throws away all drafts behind the first that is rejected, so a late place is worth as much
as the places before it let through. Both rules here look at what the drafts are now, and take it
as given: no gradient goes through a weight. Letters: C chains of drafts, K places.

Place 0 of a block is no draft, since verification has drawn its token before: it neither breaks a
chain nor gains by one, and keeps the weight 1 that all places have without these rules.
"""

import torch
from torch import Tensor

DPACE_FLOOR = 0.5
"""a of D-PACE: a place's score counts as (1 - a) · score + a, so that a place behind a bad draft
keeps some weight. The paper's value."""


def dpace_weights(score: Tensor, there: Tensor) -> Tensor:
    """D-PACE (arXiv 2605.18810, equations 7 and 8): a place's share in the expected length.

    Args:
        score: chance that the draft of each place is accepted, fp32 [C, K].
        there: which places are drafts, bool [C, K]; a chain's drafts stand at 1, 2, … without gap.

    Returns:
        For place j the sum over m ≥ j of the product of smoothed scores of places 1 … m; 1 where
        no draft is. fp32 [C, K].
    """
    smoothed = (1 - DPACE_FLOOR) * score + DPACE_FLOOR
    accepted = torch.where(there, smoothed, 1.0).cumprod(1) * there
    return torch.where(there, accepted.flip(1).cumsum(1).flip(1), 1.0)


def auf_weights(right: Tensor, there: Tensor) -> Tensor:
    """Spec-AUF (arXiv 2607.01893): 1 up to and with a chain's first wrong draft, 0 behind it.

    Args:
        right: whether the draft of each place is the one wanted, bool [C, K].
        there: as for `dpace_weights`.

    Returns:
        fp32 [C, K]; 1 where no draft is.
    """
    wrong = (there & ~right).int()
    before = wrong.cumsum(1) - wrong
    return ((before == 0) | ~there).float()
