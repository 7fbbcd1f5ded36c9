"""The LM head and the loss on top of it, a few rows at a time, so that logits never stand whole.

With a vocabulary of 151,936 the logits of one sequence of 4096 tokens and its mask section take
5 GB in fp32, and a plain cross entropy holds them three times. Here each piece of rows goes
through the head, gives its loss, and, since the weight of each row in the global loss is known
beforehand, at once its gradients; then its logits are gone. Nothing is computed twice.
Letters: R rows of a batch, N labelled ones, n rows of a piece, E hidden size, V vocabulary.
"""

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.objective.targets import Targets

PIECE_ELEMENTS = {"cpu": 2**20, "cuda": 2**27}
"""Logits of a piece: on a CPU what stays in its cache, on a GPU half a GiB in fp32, enough to keep
the matrix product busy."""
FEWEST_ROWS = 128
"""A piece has at least so many, or all."""
SUMS = ("loss", "ar", "diffusion", "overlap", "alone")
"""What `head_loss` sums up, in this order; see `Sums`."""


@dataclass(frozen=True)
class Sums:
    """Of some labelled rows; fp32 scalars."""

    loss: Tensor
    """Their share of the loss of the global batch."""
    ar: Tensor
    """Plain cross entropy of the AR rows, in nats."""
    diffusion: Tensor
    """Plain cross entropy of the slots, in nats."""
    overlap: Tensor
    """sum_v min(p_v, q_v) over slots that have a verifier; 0 unless the objective asks for p."""
    alone: Tensor
    """Plain cross entropy of drafts without slots, in nats."""


def head_loss(
    hidden: Tensor, weight: Tensor, targets: Targets, frozen: int = 0
) -> tuple[Tensor, Tensor]:
    """The loss of the labelled rows of `hidden` under the LM head `weight`.

    Args:
        hidden: final hidden states of all rows, [R, E].
        weight: the LM head's matrix, [V, E].
        targets: which rows have which labels, and what each counts.
        frozen: columns of the matrix, the first ones, that get no gradient: those of a frozen base
            beside a draft head's.

    Returns:
        The loss, an fp32 scalar with a gradient, and all `SUMS` without one, fp32 [5].
    """
    return _HeadLoss.apply(hidden, weight, targets, frozen)


def unpack(sums: Tensor) -> Sums:
    """The second result of `head_loss` by name."""
    return Sums(*sums)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Targets, frozen: int
    ) -> tuple[Tensor, Tensor]:
        sums = torch.zeros(len(SUMS), dtype=torch.float32, device=hidden.device)
        needs, learns = any(ctx.needs_input_grad[:2]), ctx.needs_input_grad[1]
        gradients = _Gradients(hidden, weight, frozen if learns else None) if needs else None
        for part in piece_slices(targets, weight.shape[0], hidden.device.type):
            own = hidden[targets.rows[part]]
            scored = _score(own, hidden, weight, targets, part)
            sums += scored.sums
            if gradients is not None and (targets.ar_counts or part.start >= targets.ar_labels):
                gradients.add(targets.rows[part], own, weight, scored.slope)
        ctx.gradients = gradients
        ctx.mark_non_differentiable(sums)
        return sums[0].clone(), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        found, ctx.gradients = ctx.gradients, None
        matrix = found.weight
        if matrix is not None:
            matrix = matrix.mul_(upstream).to(found.weight_dtype)
        return found.hidden.mul_(upstream.to(found.hidden.dtype)), matrix, None, None


class _Gradients:
    """Gradients of the loss, collected piece by piece; that of the matrix in fp32, but for its
    first `frozen` columns. With None all are."""

    def __init__(self, hidden: Tensor, weight: Tensor, frozen: int | None) -> None:
        self.hidden = torch.zeros_like(hidden)
        learns = frozen is not None
        self.weight = torch.zeros_like(weight, dtype=torch.float32) if learns else None
        self.frozen = frozen or 0
        self.weight_dtype = weight.dtype

    def add(self, rows: Tensor, own: Tensor, weight: Tensor, slope: Tensor) -> None:
        """Take in the piece of `rows` [n] with hidden states `own` [n, E]; `slope` [n, V] is the
        gradient of their logits."""
        slope = slope.to(weight.dtype)
        self.hidden[rows] = slope @ weight
        if self.weight is None:
            return
        if self.frozen:
            self.weight[:, self.frozen :] += slope.T @ own[:, self.frozen :]
        elif weight.dtype == torch.float32:
            torch.addmm(self.weight, slope.T, own, out=self.weight)
        else:
            self.weight += slope.T @ own


@dataclass(frozen=True)
class _Scored:
    sums: Tensor
    """fp32 [5], as `SUMS`."""
    slope: Tensor
    """Gradient of the logits, fp32 [n, V]."""


def piece_slices(targets: Targets, vocabulary: int, device: str) -> list[slice]:
    """The labelled rows in pieces, none of which mixes sections."""
    size = max(FEWEST_ROWS, PIECE_ELEMENTS.get(device, PIECE_ELEMENTS["cuda"]) // vocabulary)
    ends = (0, *targets.ends)
    return [
        slice(start, min(start + size, end))
        for begin, end in pairwise(ends)
        for start in range(begin, end, size)
    ]


def _score(own: Tensor, hidden: Tensor, weight: Tensor, targets: Targets, part: slice) -> _Scored:
    """Losses of the rows `part`, whose hidden states are `own` [n, E], and their slopes."""
    labels, share = targets.labels[part], targets.shares[part]
    logits = (own @ weight.T).float()
    right = logits.gather(1, labels[:, None])[:, 0]
    mean = logits.mean(1) if targets.smoothing else right
    agrees = targets.agreement != "none" and part.start >= targets.ar_labels
    # In place from here on: a second [n, V] would be the most memory there is.
    expected = _verifier(hidden, weight, targets, part) if agrees else None
    cross = -(expected * logits).sum(1) if expected is not None else right
    top = logits.amax(1, keepdim=True)
    draft = logits.sub_(top).exp_()
    total = draft.sum(1, keepdim=True)
    draft.div_(total)
    log_sum = (top + total.log())[:, 0]

    plain = log_sum - right
    smooth = targets.smoothing
    losses = (1 - smooth) * plain + smooth * (log_sum - mean)
    overlap = torch.zeros_like(share)
    factor = share[:, None]
    if expected is not None:
        losses, overlap, slope = _agreement(draft, expected, cross + log_sum, losses, targets, part)
        factor = share[:, None] * (1 - targets.mix(part))[:, None]
        slope.mul_(share[:, None])
    slope_of_labels = -(1 - smooth) * factor[:, 0]
    draft.mul_(factor)
    if smooth:
        draft.sub_(factor * (smooth / draft.shape[1]))
    draft.scatter_add_(1, labels[:, None], slope_of_labels[:, None])
    if expected is not None:
        draft.add_(slope)
    sums = torch.zeros(len(SUMS), device=share.device)
    sums[0] = (share * losses).sum()
    section = bisect_right(targets.ends, part.start)
    sums[SUMS.index(("ar", "diffusion", "alone")[section])] = plain.sum()
    if section == 1:
        sums[SUMS.index("overlap")] = overlap.sum()
    return _Scored(sums, draft)


def _verifier(hidden: Tensor, weight: Tensor, targets: Targets, part: slice) -> Tensor:
    """p: the AR distribution of each draft's position, fp32 [n, V]; taken as given, no gradient."""
    rows = targets.verifiers_of(part)
    return torch.softmax((hidden[rows.clamp(min=0)] @ weight.T).float(), 1)


def _agreement(
    draft: Tensor,
    expected: Tensor,
    cross_entropy: Tensor,
    losses: Tensor,
    targets: Targets,
    part: slice,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mix the distance between draft q and verifier p into `losses` [n].

    Args:
        draft: q, fp32 [n, V].
        expected: p, fp32 [n, V]; overwritten.
        cross_entropy: of q under p, in nats, [n].
        losses: cross entropy of the labels, [n].
        targets: the objective's mix.
        part: which rows these are.

    Returns:
        The mixed losses [n], the overlap sum_v min(p_v, q_v) of each row that has a verifier [n],
        and the slope of the mixed-in part, [n, V].
    """
    mix = targets.mix(part)
    has_verifier = targets.verifiers_of(part) >= 0
    overlap = torch.minimum(draft, expected).sum(1) * has_verifier
    if targets.agreement == "kl":
        entropy = torch.special.entr(expected).sum(1)
        distance = cross_entropy - entropy
        slope = expected.neg_().add_(draft)  # q - p
    else:
        distance = 1 - overlap  # total variation
        # d TV / d q_v is -1 where q_v < p_v and 0 elsewhere; then through the softmax.
        short = (draft < expected).to(draft.dtype).neg_()
        inner = (draft * short).sum(1, keepdim=True)
        slope = short.sub_(inner).mul_(draft)
    return (1 - mix) * losses + mix * distance, overlap, slope.mul_(mix[:, None])
