"""What the drafts of a batch count against each other: by their place in a block, and by the prefix
of drafts that would be accepted.

Decoding throws away all drafts behind the first that is rejected, so a late place is worth as much
as the places before it let through. The rules by prefix look at what the drafts are now, and take
it as given: no gradient goes through a weight. Place 0 of a block is no draft, since verification
has drawn its token before: it neither breaks a chain nor gains by one, and keeps the weight 1 that
all places have without these rules. Letters: D drafts of a batch, C chains of drafts, K places.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.data.batch import Batch

DPACE_FLOOR = 0.5
"""a of D-PACE: a place's score counts as (1 - a) · score + a, so that a place behind a bad draft
keeps some weight. The paper's value."""


def drafted_places(batch: Batch) -> tuple[Tensor, Tensor]:
    """The block of each draft and its place in it, counted from 0; int64 [D] each."""
    there = batch.blocks.there
    block, place = there.nonzero(as_tuple=True)
    chosen = there[batch.blocks.alone]
    chosen[:, :1] = False  # which no draft stands at
    number, alone_place = chosen.nonzero(as_tuple=True)
    return torch.cat([block, batch.blocks.alone[number]]), torch.cat([place, alone_place])


def place_weights(batch: Batch, position_decay: float) -> Tensor:
    """The weight of each draft by its place in its block alone, fp32 [D]: `position_decay` to the
    power of the place, counted from 0. Weights by accepted prefix come on top, and change nothing
    of what their mean is over: the number of drafts."""
    if position_decay == 1.0:
        return torch.ones(len(batch.rows) - batch.ar_labels, device=batch.rows.device)
    return position_decay ** drafted_places(batch)[1].float()


@dataclass(frozen=True)
class Chains:
    """The drafts of a batch as chains, of which decoding accepts a beginning: a block's slots, and
    once more those of a block that is drafted without them."""

    cells: Tensor
    """int64 [D]: where each draft stands in a table of chains and places, flattened."""
    drafts: Tensor
    """bool [D]: all but those at place 0, whose token decoding has before it drafts."""
    shape: tuple[int, int]
    """Of the table."""

    def to(self, device: torch.device) -> "Chains":
        cells, drafts = (x.to(device, non_blocking=True) for x in (self.cells, self.drafts))
        return Chains(cells, drafts, self.shape)


def chains_of(batch: Batch) -> Chains:
    """The chains of `batch`: its blocks, then those that are drafted without slots."""
    blocks, longest = batch.blocks.slots.shape
    _, place = drafted_places(batch)
    number = batch.blocks.there.nonzero(as_tuple=True)[0]
    alone = batch.rows[len(batch.rows) - batch.alone_labels :] - batch.input_ids.numel()
    cells = torch.cat([number * longest + place[: len(number)], blocks * longest + alone])
    return Chains(cells, place > 0, (blocks + len(batch.blocks.alone), longest))


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
