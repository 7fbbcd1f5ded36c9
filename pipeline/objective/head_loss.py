"""The LM head and the loss on top of it, a few rows at a time, so that logits never stand whole.

With a vocabulary of 151,936 the logits of one sequence of 4096 tokens and its mask section take
5 GB in fp32, and a plain cross entropy holds them three times. Here each piece of rows goes
through the head, gives its loss, and, since the weight of each row in the global loss is known
beforehand, at once its gradients; then its logits are gone. Nothing is computed twice, but for
weights by accepted prefix: those ask what all drafts of a block are, so drafts go through the head
once before, forward only.

Distances between a draft's distribution q and a teacher's distribution p of the same position.

    kl          KL(p || q)
    tv          TV(p, q) = 1 - sum_v min(p_v, q_v), the chance that decoding rejects the draft
    acceptance  -log sum_v min(p_v, q_v)
    blend       lambda · KL + (1 - lambda) · TV, lambda = exp(-3 · sum_v min(p_v, q_v))

The last two are LK losses (arXiv 2602.23881): where p and q hardly overlap TV has next to no
gradient, and `acceptance` divides by what it lacks, while `blend` starts as KL and becomes TV as
drafts get better. p is taken as given, and so is lambda, a number of each row.
All four have the gradient c_kl · (q - p) + c_tv · q · (s - sum_v q_v s_v) over the logits of q,
s_v being -1 where q_v < p_v and else 0, with coefficients of their own.
Letters: R rows of a batch, N labelled ones, D of them drafts, n rows of a piece, E hidden size,
V vocabulary.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.objective.loss import MEASURED, Targets, auf_weights, dpace_weights

PIECE_ELEMENTS = {"cpu": 2**20, "cuda": 2**27}
"""Logits of a piece: on a CPU what stays in its cache, on a GPU half a GiB in fp32, enough to keep
the matrix product busy."""
FEWEST_ROWS = 128
"""A piece has at least so many, or all."""
SUMS = ("loss", "ar", "diffusion", "overlap", "alone")
"""What `head_loss` sums up, in this order; see `Sums`."""
BLEND_DECAY = 3.0
"""How fast lambda falls with the overlap."""
PLAIN = ("ar", "diffusion", "alone")
"""Whose plain cross entropy each section adds to."""


@dataclass(frozen=True)
class Sums:
    """Of some labelled rows; fp32 scalars."""

    loss: Tensor
    """Their share of the loss of the global batch."""
    ar: Tensor
    """Plain cross entropy of the AR rows, in nats; an estimate where they do not count."""
    diffusion: Tensor
    """Plain cross entropy of the slots, in nats."""
    overlap: Tensor
    """sum_v min(p_v, q_v) over slots that have a teacher's p; 0 unless the objective compares."""
    alone: Tensor
    """Plain cross entropy of drafts of the head alone, in nats."""


def head_loss(
    hidden: Tensor, weight: Tensor, targets: Targets, frozen: int = 0
) -> tuple[Tensor, Tensor]:
    """The loss of the labelled rows of `hidden` under the LM head `weight`.

    What asks for no gradient gets none and costs none.

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
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        gradients = _Gradients(hidden, weight, needs_hidden, frozen if needs_weight else None)
        shares = prefix_shares(hidden, weight, targets)
        for part in piece_slices(targets, weight.shape[0], hidden.device.type):
            if not targets.ar_counts and part.start < targets.ar_labels:
                continue
            states = hidden[targets.rows[part]]
            scored = _score(states, hidden, weight, targets, part, shares[part])
            sums += scored.sums
            gradients.add(targets.rows[part], states, weight, scored.slope)
        if not targets.ar_counts:
            sums[SUMS.index("ar")] = _estimate(hidden, weight, targets)
        ctx.gradients = gradients
        ctx.mark_non_differentiable(sums)
        return sums[0].clone(), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        return *gradients.scaled(upstream), None, None


class _Gradients:
    """Gradients of the loss that are asked for, collected piece by piece; that of the matrix in
    fp32, of all but its first `frozen` columns. With None it has none."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, needs_hidden: bool, frozen: int | None
    ) -> None:
        self.hidden = torch.zeros_like(hidden) if needs_hidden else None
        self.frozen = frozen or 0
        self.weight = None
        if frozen is not None:
            self.weight = torch.zeros_like(weight[:, self.frozen :], dtype=torch.float32)
        self.weight_dtype = weight.dtype

    def add(self, rows: Tensor, states: Tensor, weight: Tensor, slope: Tensor) -> None:
        """Take in the piece of `rows` [n] with hidden `states` [n, E]; `slope` [n, V] is the
        gradient of their logits."""
        slope = slope.to(weight.dtype)
        if self.hidden is not None:
            self.hidden[rows] = slope @ weight
        if self.weight is None:
            return
        states = states[:, self.frozen :]
        if weight.dtype == torch.float32:
            torch.addmm(self.weight, slope.T, states, out=self.weight)
        else:
            self.weight += slope.T @ states

    def scaled(self, factor: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Both times `factor`, whole and in the types of what they are gradients of; only once."""
        if self.hidden is not None:
            self.hidden.mul_(factor.to(self.hidden.dtype))
        matrix = self.weight
        if matrix is not None:
            matrix = matrix.mul_(factor).to(self.weight_dtype)
            matrix = F.pad(matrix, (self.frozen, 0)) if self.frozen else matrix
        return self.hidden, matrix


@dataclass(frozen=True)
class _Scored:
    sums: Tensor
    """fp32 [5], as `SUMS`."""
    slope: Tensor
    """Gradient of the logits, fp32 [n, V]."""


def piece_slices(targets: Targets, vocabulary: int, device: str) -> list[slice]:
    """The labelled rows in pieces, none of which mixes sections."""
    size = piece_size(vocabulary, device)
    ends = (0, *targets.ends)
    return [
        slice(start, min(start + size, end))
        for begin, end in pairwise(ends)
        for start in range(begin, end, size)
    ]


def piece_size(vocabulary: int, device: str) -> int:
    """Rows of a piece, at most."""
    return max(FEWEST_ROWS, PIECE_ELEMENTS.get(device, PIECE_ELEMENTS["cuda"]) // vocabulary)


def prefix_shares(hidden: Tensor, weight: Tensor, targets: Targets) -> Tensor:
    """What each labelled row counts, fp32 [N]: `targets.shares`, with weights by accepted prefix
    where the objective asks for them.

    A weight depends on the drafts of its own block alone, so on no division of the global batch.
    """
    if targets.chains is None:
        return targets.shares
    pieces = list(_scores_of_drafts(hidden, weight, targets))
    if not pieces:
        return targets.shares
    scores = torch.cat(pieces)
    there = torch.zeros(targets.chains.shape, dtype=torch.bool, device=scores.device)
    table = torch.zeros(targets.chains.shape, dtype=scores.dtype, device=scores.device)
    there.view(-1)[targets.chains.cells] = targets.chains.drafts
    table.view(-1)[targets.chains.cells] = scores
    rule = dpace_weights if targets.place_weights == "dpace" else auf_weights
    weights = rule(table, there).view(-1)[targets.chains.cells]
    shares = targets.shares.clone()
    shares[targets.ar_labels :] *= weights
    return shares


def _scores_of_drafts(hidden: Tensor, weight: Tensor, targets: Targets) -> Iterator[Tensor]:
    """How each draft would fare, in pieces that together are [D]: for `dpace` the chance of its
    acceptance, q(label) or sum_v min(p_v, q_v); for `auf` whether its argmax is the one wanted."""
    for part in piece_slices(targets, weight.shape[0], hidden.device.type):
        if part.start < targets.ar_labels:
            continue
        logits = (hidden[targets.rows[part]] @ weight.T).float()
        labels = targets.labels[part]
        if targets.place_weights == "auf":
            if targets.teacher == "ar":
                rows = targets.verifiers_of(part)
                labels = (hidden[rows.clamp(min=0)] @ weight.T).argmax(1)
            yield logits.argmax(1) == labels
        elif targets.teacher == "ar":
            expected = _verifier(hidden, weight, targets, part)
            yield torch.minimum(expected, logits.softmax(1)).sum(1)
        else:
            yield (logits.gather(1, labels[:, None])[:, 0] - logits.logsumexp(1)).exp()


def _estimate(hidden: Tensor, weight: Tensor, targets: Targets) -> Tensor:
    """The summed plain cross entropy of all AR rows, in nats, from those that are measured."""
    total = torch.zeros((), device=hidden.device)
    for chosen in targets.measured.split(piece_size(weight.shape[0], hidden.device.type)):
        logits = (hidden[targets.rows[chosen]] @ weight.T).float()
        right = logits.gather(1, targets.labels[chosen][:, None])[:, 0]
        total += (logits.logsumexp(1) - right).sum()
    return total * MEASURED


def _score(
    states: Tensor, hidden: Tensor, weight: Tensor, targets: Targets, part: slice, share: Tensor
) -> _Scored:
    """Losses of the rows `part`, whose hidden `states` are [n, E], and their slopes; each row
    counts its `share` [n]."""
    labels = targets.labels[part]
    section = bisect_right(targets.ends, part.start)
    compares = targets.agreement != "none" and section > 0
    logits = (states @ weight.T).float()
    right = logits.gather(1, labels[:, None])[:, 0]
    mean = logits.mean(1) if targets.smoothing else right
    # In place from here on: a second [n, V] would be the most memory there is.
    expected = None
    if compares and targets.teacher == "ar":
        expected = _verifier(hidden, weight, targets, part)
    cross = -(expected * logits).sum(1) if expected is not None else -right
    top = logits.amax(1, keepdim=True)
    draft = logits.sub_(top).exp_()
    total = draft.sum(1, keepdim=True)
    draft.div_(total)
    log_sum = (top + total.log())[:, 0]

    plain = log_sum - right
    smooth = targets.smoothing
    losses = (1 - smooth) * plain + smooth * (log_sum - mean)
    # The slope is kept · (q - smoothed label) + text · (q - label) + that of a distance from p.
    kept, text, slope = share, torch.zeros_like(share), None
    sums = torch.zeros(len(SUMS), device=share.device)
    if compares:
        mix = targets.mix(part)
        distance, overlap, text, slope = _agreement(
            draft, expected, cross + log_sum, labels, share * mix, targets
        )
        kept, losses = share * (1 - mix), (1 - mix) * losses + mix * distance
        if section == 1:
            sums[SUMS.index("overlap")] = (overlap * (mix > 0)).sum()
    draft.mul_((kept + text)[:, None])
    if smooth:
        draft.sub_((kept * (smooth / draft.shape[1]))[:, None])
    draft.scatter_add_(1, labels[:, None], -((1 - smooth) * kept + text)[:, None])
    if slope is not None:
        draft.add_(slope)
    sums[SUMS.index("loss")] = (share * losses).sum()
    sums[SUMS.index(PLAIN[section])] = plain.sum()
    return _Scored(sums, draft)


def _verifier(hidden: Tensor, weight: Tensor, targets: Targets, part: slice) -> Tensor:
    """p: the AR distribution of each draft's position, fp32 [n, V]; taken as given, no gradient."""
    rows = targets.verifiers_of(part)
    return torch.softmax((hidden[rows.clamp(min=0)] @ weight.T).float(), 1)


def _agreement(
    draft: Tensor,
    expected: Tensor | None,
    cross_entropy: Tensor,
    labels: Tensor,
    factor: Tensor,
    targets: Targets,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The distance of each draft from its teacher.

    Args:
        draft: q, fp32 [n, V].
        expected: p, fp32 [n, V], overwritten; None is the text, all on its label.
        cross_entropy: of q under p, in nats, [n].
        labels: int64 [n]
        factor: what a row's distance counts, [n].
        targets: the objective.

    Returns:
        The distances [n], the overlaps sum_v min(p_v, q_v) [n], and the slope: a coefficient of
        q - label [n], which is all where the text teaches, or else 0 and the slope itself [n, V].
    """
    kind = targets.agreement
    if expected is None:
        overlap = draft.gather(1, labels[:, None])[:, 0]
        kl, tv = coefficients(kind, overlap)
        # s (see above) is -1 at the label alone, so both terms point the same way.
        coefficient = torch.ones_like(kl) if kind == "acceptance" else kl + tv * overlap
        divergence = cross_entropy
        if kind != "acceptance":
            divergence = distances(kind, overlap, cross_entropy)
        return divergence, overlap, factor * coefficient, None
    overlap = torch.minimum(draft, expected).sum(1)
    divergence = cross_entropy
    if kind in ("kl", "blend"):
        divergence = cross_entropy - torch.special.entr(expected).sum(1)
    kl, tv = coefficients(kind, overlap)
    slope = slope_(
        draft,
        expected,
        None if kind in ("tv", "acceptance") else kl,
        None if kind == "kl" else tv,
        factor,
    )
    return distances(kind, overlap, divergence), overlap, torch.zeros_like(factor), slope


def coefficients(agreement: str, overlap: Tensor) -> tuple[Tensor, Tensor]:
    """c_kl and c_tv of each row, [n], given sum_v min(p_v, q_v) [n]."""
    ones, none = torch.ones_like(overlap), torch.zeros_like(overlap)
    if agreement == "kl":
        return ones, none
    if agreement == "tv":
        return none, ones
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
