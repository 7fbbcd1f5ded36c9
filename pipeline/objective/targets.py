"""What each labelled row of a batch counts in the loss of the global batch, and what it is for.

Letters: B sequences, S clean tokens, M slots, N labelled rows, P of them slots.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.data.batch import Batch
from pipeline.objective.joint import ObjectiveConfig


@dataclass(frozen=True)
class Targets:
    """Labels and weights of the labelled rows of one micro-batch, those of the AR loss first."""

    rows: Tensor
    """int64 [N], among B · (S + M)."""
    labels: Tensor
    """int64 [N]"""
    ar_labels: int
    """How many of the rows belong to the AR loss."""
    shares: Tensor
    """fp32 [N]: the loss of the global batch is the sum of share times row loss."""
    verifiers: Tensor
    """int64 [P]: the clean row whose logits are for a slot's position, or -1 where a document's
    first token has none; empty unless the objective compares the two."""
    agreement: str
    """`none`, `tv` or `kl`."""
    agreement_weight: float
    smoothing: float
    ar_counts: bool = True
    """Whether the rows of the AR loss count in the loss; else they are only measured."""

    def verifiers_of(self, part: slice) -> Tensor:
        """Of the slots among the labelled rows `part`."""
        return self.verifiers[part.start - self.ar_labels : part.stop - self.ar_labels]

    def mix(self, part: slice) -> Tensor:
        """How much of the agreement loss each slot of `part` takes, fp32: nothing without a
        verifier."""
        return self.agreement_weight * (self.verifiers_of(part) >= 0).float()


def make_targets(
    batch: Batch, objective: ObjectiveConfig, ar_labels: int, draft_weight: float
) -> Targets:
    """The targets of `batch`, on its device.

    Args:
        batch: one micro-batch.
        objective: with the weights of this step (`ObjectiveConfig.at`).
        ar_labels: labelled clean tokens of the global batch.
        draft_weight: `draft_weights` of the global batch, summed.
    """
    # The two terms of the joint loss, (alpha · mean AR + mean diffusion) / (1 + alpha).
    drafts = draft_weights(batch, objective)
    ar, draft = 1.0, 0.0
    if objective.drafts:
        ar, draft = objective.alpha / (1 + objective.alpha), 1 / (1 + objective.alpha)
    ar_share = ar / max(ar_labels, 1)
    shares = torch.cat(
        [
            torch.full((batch.ar_labels,), ar_share, device=drafts.device),
            drafts * (draft / max(draft_weight, 1e-30)),
        ]
    )
    compares = objective.agreement != "none" and objective.agreement_weight > 0
    none = torch.zeros(0, dtype=torch.int64, device=drafts.device)
    return Targets(
        rows=batch.rows,
        labels=batch.labels,
        ar_labels=batch.ar_labels,
        shares=shares,
        verifiers=verifying_rows(batch) if compares else none,
        agreement=objective.agreement if compares else "none",
        agreement_weight=objective.agreement_weight,
        smoothing=objective.label_smoothing,
        ar_counts=ar > 0,
    )


def draft_weights(batch: Batch, objective: ObjectiveConfig) -> Tensor:
    """The weight of each slot by its place in its block, fp32 [P]: `position_decay` to the power
    of the place, counted from 0."""
    slots = batch.rows[batch.ar_labels :]
    if objective.position_decay == 1.0:
        return torch.ones(len(slots), device=slots.device)
    # A block starts where its prefix ends; an empty prefix ends at the document's start.
    place = batch.position_ids.flatten()[slots] - batch.spans.upper.flatten()[slots]
    return objective.position_decay ** place.float()


def verifying_rows(batch: Batch) -> Tensor:
    """For each slot the clean row whose logits are for the same position, int64 [P]; -1 where the
    position is a document's first."""
    width = batch.input_ids.shape[1]
    slots = batch.rows[batch.ar_labels :]
    position = batch.position_ids.flatten()[slots]
    start = batch.spans.lower.flatten()[slots]
    before = slots // width * width + position - 1
    return torch.where(position > start, before, -1)
