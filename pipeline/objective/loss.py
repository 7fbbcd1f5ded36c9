"""The joint loss of TiDAR: next-token prediction and one-step masked diffusion, side by side.

    L = (alpha · mean CE_AR + mean CE_diffusion) / (1 + alpha)

Each mean is over that section's labelled tokens of the *global* batch, so the gradient does not
depend on how the batch was divided. Source: TiDAR (arXiv 2511.08923), section 3.1. A model with a
draft head drafts some blocks without their slots as well; their mean joins with a weight of its
own, rho:

    L = (alpha · mean CE_AR + mean CE_diffusion + rho · mean CE_alone) / (1 + alpha + rho)

`make_targets` makes this of a batch: which rows have which labels, and what share of the loss each
has. `head_loss.py` computes it piece by piece on the LM head.

Drafts may count by their place in a block, and by the prefix of drafts that would be accepted:
decoding throws away all drafts behind the first that is rejected, so a late place is worth as much
as the places before it let through. The rules by prefix look at what the drafts are now, and take
it as given: no gradient goes through a weight. Place 0 of a block is no draft, since verification
has drawn its token before: it neither breaks a chain nor gains by one, and keeps the weight 1 that
all places have without these rules.

Letters: B sequences, S clean tokens, M slots, N labelled rows, D of them drafts: slots, and behind
them the rows of drafts of the head alone; C chains of drafts, K places.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pipeline.data.batch import Batch
from pipeline.objective.config import ObjectiveConfig

MEASURED = 8
"""Of the rows of an AR loss that does not count (`alpha=0`), one in so many is measured."""


@dataclass(frozen=True)
class Targets:
    """Labels and weights of the labelled rows of one micro-batch, section by section: those of the
    AR loss, slots, drafts of the head alone."""

    rows: Tensor
    """int64 [N], among B · (S + M) and the rows of drafts of the head alone behind them."""
    labels: Tensor
    """int64 [N]"""
    ar_labels: int
    """How many of the rows belong to the AR loss."""
    shares: Tensor
    """fp32 [N]: the loss of the global batch is the sum of share times row loss."""
    verifiers: Tensor
    """int64 [D]: the clean row whose logits are for a draft's position, or -1 where a document's
    first token has none; empty unless the objective asks the AR half."""
    agreement: str
    """`none` or a distance of `pipeline.objective.head_loss`."""
    agreement_weight: float
    smoothing: float
    ar_counts: bool = True
    """Whether the rows of the AR loss count in the loss; else some of them are measured."""
    measured: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    """int64, among the N labelled rows: those that are then, one in `MEASURED`."""
    alone_labels: int = 0
    """How many of the rows, the last ones, belong to drafts of the head alone."""
    teacher: str = "ar"
    """Whose distribution drafts are compared with, `ar` or `text`."""
    place_weights: str = "decay"
    """Rule of weights by accepted prefix, `dpace` or `auf`; with others `shares` are all."""
    chains: "Chains | None" = None
    """Where such a rule is."""

    @property
    def ends(self) -> tuple[int, int, int]:
        """Where the sections end."""
        total = len(self.labels)
        return self.ar_labels, total - self.alone_labels, total

    def verifiers_of(self, part: slice) -> Tensor:
        """Of the drafts among the labelled rows `part`."""
        return self.verifiers[part.start - self.ar_labels : part.stop - self.ar_labels]

    def mix(self, part: slice) -> Tensor:
        """How much of the agreement loss each draft of `part` takes, fp32: nothing without a
        teacher."""
        if self.teacher == "text":
            return torch.full_like(self.shares[part], self.agreement_weight)
        return self.agreement_weight * (self.verifiers_of(part) >= 0).float()

    def to(self, device: torch.device) -> "Targets":
        """The same with its tensors on `device`."""
        tensors = (self.rows, self.labels, self.shares, self.verifiers, self.measured)
        rows, labels, shares, verifiers, measured = (
            x.to(device, non_blocking=True) for x in tensors
        )
        chains = self.chains.to(device) if self.chains is not None else None
        return replace(
            self, rows=rows, labels=labels, shares=shares, verifiers=verifiers,
            measured=measured, chains=chains,
        )  # fmt: skip


def make_targets(
    batch: Batch,
    objective: ObjectiveConfig,
    ar_labels: int,
    draft_weight: float,
    alone_draft_weight: float = 0.0,
    weights: Tensor | None = None,
) -> Targets:
    """The targets of `batch`, on its device; on the host nothing waits for a GPU.

    Args:
        batch: one micro-batch.
        objective: with the weights of this step (`ObjectiveConfig.at`).
        ar_labels: labelled clean tokens of the global batch.
        draft_weight: `place_weights` of the global batch's slots, summed.
        alone_draft_weight: the same of its drafts of the head alone.
        weights: `place_weights` of `batch`, where they are known, fp32 [D].
    """
    # The terms of the joint loss, (alpha · AR + diffusion + rho · alone) / (1 + alpha + rho).
    weights = place_weights(batch, objective.position_decay) if weights is None else weights
    ar, draft, alone = 1.0, 0.0, 0.0
    if objective.drafts:
        rho = objective.alone_weight if alone_draft_weight > 0 else 0.0
        whole = 1 + objective.alpha + rho
        ar, draft, alone = objective.alpha / whole, 1 / whole, rho / whole
    slots, device = batch.diffusion_labels, weights.device
    shares = torch.cat(
        [
            torch.full((batch.ar_labels,), ar / max(ar_labels, 1), device=device),
            weights[:slots] * (draft / max(draft_weight, 1e-30)),
            weights[slots:] * (alone / max(alone_draft_weight, 1e-30)),
        ]
    )
    compares, by_prefix = objective.compares, objective.by_prefix
    asks_ar = objective.teacher == "ar" and (compares or by_prefix)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    return Targets(
        rows=batch.rows,
        labels=batch.labels,
        ar_labels=batch.ar_labels,
        shares=shares,
        verifiers=verifying_rows(batch) if asks_ar else none,
        agreement=objective.agreement if compares else "none",
        agreement_weight=objective.agreement_weight,
        smoothing=objective.label_smoothing,
        alone_labels=batch.alone_labels,
        teacher=objective.teacher,
        place_weights=objective.place_weights,
        chains=chains_of(batch) if by_prefix else None,
        ar_counts=ar > 0,
        measured=none if ar > 0 else measured_rows(batch),
    )


def measured_rows(batch: Batch) -> Tensor:
    """Some of the labelled rows of the AR loss, int64: whole, a loss that does not count would be a
    third of the head's products. Which ones depends on positions alone, so on no division of the
    global batch; a sequence's first position, which loses most, is none."""
    position = batch.position_ids.flatten()[batch.rows[: batch.ar_labels]]
    return (position % MEASURED == MEASURED // 2).nonzero(as_tuple=True)[0]


def verifying_rows(batch: Batch) -> Tensor:
    """For each draft the clean row whose logits are for the same position, int64 [D]; -1 where the
    position is a document's first."""
    width = batch.input_ids.shape[1]
    slots = batch.blocks.slots[drafted_places(batch)]
    position = batch.position_ids.flatten()[slots]
    start = batch.spans.lower.flatten()[slots]
    before = slots // width * width + position - 1
    return torch.where(position > start, before, -1)


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
    """The chains of `batch`: its blocks, then those that are drafted by the head alone."""
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
