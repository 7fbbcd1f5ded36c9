"""Every objective over whole logits, row by row as docs/training.md states it, for autograd."""

import torch
import torch.nn.functional as F

PREFIX_FLOOR = 0.5


def chains_of(batch):
    """The drafts of each block, then of each that is drafted by the head alone: a list of (row,
    slot that has the same position, place) each."""
    longest = batch.blocks.slots.shape[1]
    chains = [
        [(row, row, place) for place, row in enumerate(block) if row >= 0]
        for block in batch.blocks.slots.tolist()
    ]
    for order, number in enumerate(batch.blocks.alone.tolist()):
        first = batch.input_ids.numel() + order * longest
        chains.append([(first + place, row, place) for _, row, place in chains[number] if place])
    return chains


def verifier_of(batch, slot):
    """The clean row before the slot's position; None at a document's start."""
    width = batch.input_ids.shape[1]
    sequence, column = divmod(slot, width)
    position = int(batch.position_ids[sequence, column])
    if position == int(batch.spans.lower[sequence, column]):
        return None
    return sequence * width + position - 1


def teacher_of(batch, objective, logs, slot, label):
    """p of a draft, [V], or None."""
    if objective.teacher == "text":
        return F.one_hot(torch.tensor(label), logs.shape[1]).to(logs.dtype)
    row = verifier_of(batch, slot)
    return None if row is None else logs[row].detach().exp()


def distance(kind, p, q):
    overlap = torch.minimum(p, q).sum()
    kl = (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum()
    tv = 0.5 * (p - q).abs().sum()
    if kind == "blend":
        share = torch.exp(-3 * overlap.detach())
        return share * kl + (1 - share) * tv
    return {"kl": kl, "tv": tv, "acceptance": -overlap.log()}[kind]


def place_weights(batch, objective, logs, label_of, chain):
    """The weight of each draft of a chain."""
    if objective.place_weights in ("uniform", "decay"):
        return [objective.position_decay**place for _, _, place in chain]
    scores = {}
    for row, slot, place in chain:
        if place == 0:
            continue
        p, q = teacher_of(batch, objective, logs, slot, label_of[row]), logs[row].exp()
        if objective.place_weights == "auf":
            scores[place] = float(p.argmax() == q.argmax())
        else:
            score = float(torch.minimum(p, q.detach()).sum())
            scores[place] = (1 - PREFIX_FLOOR) * score + PREFIX_FLOOR

    def reach(place):
        product = 1.0
        for before in range(1, place + 1):
            product *= scores[before]
        return product

    if objective.place_weights == "auf":
        return [reach(place - 1) for _, _, place in chain]
    last = max((place for _, _, place in chain), default=0)
    return [
        sum(reach(m) for m in range(place, last + 1)) if place else 1.0 for _, _, place in chain
    ]


def dense_loss(hidden, weight, batch, objective, totals):
    """The share of `batch` in the loss of the global batch.

    `totals` are what the three means are over: AR labels, and weights of slots and of drafts
    of the head alone.
    """
    logs = F.log_softmax(hidden @ weight.T, -1)
    label_of = dict(zip(batch.rows.tolist(), batch.labels.tolist(), strict=True))
    smooth = objective.label_smoothing

    def smoothed(row):
        return -(1 - smooth) * logs[row, label_of[row]] - smooth * logs[row].mean()

    ar = sum(smoothed(row) for row in batch.rows[: batch.ar_labels].tolist()) / totals[0]
    if not objective.drafts:
        return ar
    drafts = [0.0, 0.0]
    for number, chain in enumerate(chains_of(batch)):
        alone = number >= len(batch.blocks.slots)
        weights = place_weights(batch, objective, logs, label_of, chain)
        for (row, slot, _), own in zip(chain, weights, strict=True):
            loss, label = smoothed(row), label_of[row]
            p = teacher_of(batch, objective, logs, slot, label)
            if objective.compares and p is not None:
                mix = objective.agreement_weight
                loss = (1 - mix) * loss + mix * distance(objective.agreement, p, logs[row].exp())
            drafts[alone] = drafts[alone] + own * loss / totals[1 + alone]
    rho = objective.alone_weight if totals[2] else 0.0
    total = objective.alpha * ar + drafts[0] + rho * drafts[1]
    return total / (1 + objective.alpha + rho)
