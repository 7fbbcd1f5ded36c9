"""The piecewise loss against autograd over whole logits, written out plainly."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data_prep.layout import build_layout
from pipeline.data.batch import make_batch
from pipeline.data.source import Sequence
from pipeline.objective import head_loss as module
from pipeline.objective.head_loss import head_loss, piece_slices, unpack
from pipeline.objective.joint import ObjectiveConfig, joint_loss, loss_sums
from pipeline.objective.targets import make_targets, place_weights, verifying_rows

VOCABULARY, WIDTH = 23, 6
OBJECTIVES = {
    "published": ObjectiveConfig(alpha=0.7),
    "ar twin": ObjectiveConfig("ar"),
    "smoothed": ObjectiveConfig(label_smoothing=0.1),
    "by position": ObjectiveConfig(alpha=0.3, position_decay=0.8),
    "tv": ObjectiveConfig(agreement="tv", agreement_weight=0.6, position_decay=0.9),
    "kl": ObjectiveConfig(agreement="kl", agreement_weight=1.0, label_smoothing=0.05),
}


@pytest.fixture
def batch():
    """Half of the blocks are drafted without slots, too."""
    return made_batch(slots=16, alone_share=0.5)


def made_batch(slots, alone_share=0.0):
    """Two sequences with several documents, one of a single token, and padding."""
    rng = np.random.default_rng(0)
    sequences = []
    for lengths, padding in (([7, 1, 8], 0), ([5, 6], 5)):
        layout = build_layout(lengths, 4, shift=True, rng=rng)
        documents = np.array([*lengths, padding] if padding else lengths)
        tokens = rng.integers(0, VOCABULARY, size=16)
        sequences.append(Sequence(tokens, documents, padding, layout))
    return make_batch(sequences, 0, slots, alone_share)


@pytest.fixture
def leaves(batch):
    generator = torch.Generator().manual_seed(0)
    rows = batch.input_ids.numel() + batch.blocks.slots[batch.blocks.alone].numel()
    hidden = torch.randn(rows, WIDTH, generator=generator)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_()


def counted(batch, objective):
    """Twice this batch's own labels, as if another rank held as many."""
    weights = place_weights(batch, objective)
    slots = weights[: batch.diffusion_labels].sum(), weights[batch.diffusion_labels :].sum()
    return 2 * batch.ar_labels, *(2 * float(weight) for weight in slots)


def plain(hidden, weight, batch, objective):
    """The loss row by row as the docs state it, by autograd."""
    ar_labels, *totals = counted(batch, objective)
    logs = F.log_softmax(hidden @ weight.T, -1)
    width = batch.input_ids.shape[1]
    ar, drafts = 0.0, [0.0, 0.0]
    slot_of = {}
    for order, block in enumerate(batch.blocks.alone.tolist()):
        for place, slot in enumerate(batch.blocks.slots[block].tolist()):
            slot_of[batch.input_ids.numel() + order * batch.blocks.slots.shape[1] + place] = slot
    for number, (row, label) in enumerate(
        zip(batch.rows.tolist(), batch.labels.tolist(), strict=True)
    ):
        smooth = objective.label_smoothing
        loss = -(1 - smooth) * logs[row, label] - smooth * logs[row].mean()
        if number < batch.ar_labels:
            ar = ar + loss / ar_labels
            continue
        sequence, column = divmod(slot_of.get(row, row), width)
        position = int(batch.position_ids[sequence, column])
        begin, first = (int(x[sequence, column]) for x in (batch.spans.lower, batch.spans.upper))
        if objective.agreement != "none" and position > begin:
            p = logs[sequence * width + position - 1].detach().exp()
            q = logs[row].exp()
            distance = (
                0.5 * (p - q).abs().sum()
                if objective.agreement == "tv"
                else (p * (p.log() - logs[row])).sum()
            )
            mix = objective.agreement_weight
            loss = (1 - mix) * loss + mix * distance
        alone = row in slot_of
        share = objective.position_decay ** (position - first) / totals[alone]
        drafts[alone] = drafts[alone] + share * loss
    if not objective.drafts:
        return ar
    rho = objective.alone_weight if totals[1] else 0.0
    total = objective.alpha * ar + drafts[0] + rho * drafts[1]
    return total / (1 + objective.alpha + rho)


@pytest.mark.parametrize("piece", [None, 3 * VOCABULARY])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradients_are_those_of_whole_logits(batch, leaves, name, piece, monkeypatch):
    if piece is not None:
        monkeypatch.setattr(module, "FEWEST_ROWS", 1)
        monkeypatch.setitem(module.PIECE_ELEMENTS, "cpu", piece)
    objective = OBJECTIVES[name]
    if not objective.drafts:
        batch = made_batch(slots=0)
        leaves = leaves[0][: batch.input_ids.numel()].detach().requires_grad_(), leaves[1]
    targets = make_targets(batch, objective, *counted(batch, objective))
    pieces = piece_slices(targets, VOCABULARY, "cpu")
    assert len(pieces) > 5 if piece else len(pieces) <= 3
    loss, sums = head_loss(*leaves, targets)
    expected = plain(*leaves, batch, objective)
    torch.testing.assert_close(loss, expected)
    # Upstream factors, as DeepSpeed's scaling is one, go through.
    got = torch.autograd.grad(loss * 3.5, leaves)
    for own, other in zip(got, torch.autograd.grad(expected * 3.5, leaves), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-7)
    logits = (leaves[0] @ leaves[1].T)[batch.rows]
    drafted = batch.ar_labels + batch.diffusion_labels
    reference = loss_sums(logits[:drafted], batch.labels[:drafted], batch.ar_labels)
    named = unpack(sums)
    torch.testing.assert_close(named.ar, reference.ar)
    torch.testing.assert_close(named.diffusion, reference.diffusion)
    torch.testing.assert_close(named.loss, loss.detach())
    alone = F.cross_entropy(logits[drafted:], batch.labels[drafted:], reduction="sum")
    torch.testing.assert_close(named.alone, alone)


def test_the_published_objective_is_the_joint_loss(leaves):
    batch = made_batch(slots=16)
    objective = ObjectiveConfig(alpha=0.4)
    loss, _ = head_loss(*leaves, make_targets(batch, objective, 50, 60.0))
    sums = loss_sums((leaves[0] @ leaves[1].T)[batch.rows], batch.labels, batch.ar_labels)
    torch.testing.assert_close(loss, joint_loss(sums, objective, 50, 60))


def test_overlap_is_the_chance_of_acceptance(batch, leaves):
    objective = OBJECTIVES["tv"]
    targets = make_targets(batch, objective, *counted(batch, objective))
    _, sums = head_loss(*leaves, targets)
    probabilities = torch.softmax(leaves[0] @ leaves[1].T, -1)
    slots = batch.rows[batch.ar_labels :][: batch.diffusion_labels]
    verifier = targets.verifiers[: len(slots)]
    paired = verifier >= 0
    p, q = probabilities[verifier[paired]], probabilities[slots[paired]]
    torch.testing.assert_close(unpack(sums).overlap, torch.minimum(p, q).sum())


def test_verifiers_are_the_rows_before(batch):
    """The clean row one position before, in the same document; none for a document's first."""
    slots, verifiers = batch.rows[batch.ar_labels :], verifying_rows(batch)
    slots, alone = slots[: batch.diffusion_labels], slots[batch.diffusion_labels :]
    firsts = {0: {0, 7, 8}, 1: {0, 5}}
    for slot, verifier in zip(slots.tolist(), verifiers[: len(slots)].tolist(), strict=True):
        sequence, column = divmod(slot, 32)
        position = int(batch.position_ids[sequence, column])
        expected = -1 if position in firsts[sequence] else sequence * 32 + position - 1
        assert verifier == expected
    # A draft without its slot has the slot's.
    of_slot = dict(zip(slots.tolist(), verifiers.tolist(), strict=False))
    assert len(alone) == batch.alone_labels > 3
    for row, verifier in zip(alone.tolist(), verifiers[len(slots) :].tolist(), strict=True):
        order, place = divmod(row - batch.input_ids.numel(), batch.blocks.slots.shape[1])
        assert verifier == of_slot[int(batch.blocks.slots[batch.blocks.alone[order], place])] >= 0
    # What such a clean row is trained to predict is what its draft is trained to predict.
    label = dict(zip(batch.rows.tolist(), batch.labels.tolist(), strict=True))
    for row, verifier in zip(batch.rows[batch.ar_labels :].tolist(), verifiers, strict=True):
        assert verifier < 0 or label[int(verifier)] == label[row]


def test_weights_fall_with_the_place_in_the_block(batch):
    weights = place_weights(batch, ObjectiveConfig(position_decay=0.5))
    slots = batch.rows[batch.ar_labels :][: batch.diffusion_labels].tolist()
    alone = batch.rows[batch.ar_labels :][batch.diffusion_labels :] - batch.input_ids.numel()
    alone_places = alone % batch.blocks.slots.shape[1]
    assert torch.equal(weights[len(slots) :], 0.5 ** alone_places.float())
    weights = weights[: len(slots)]
    block = batch.spans.block.flatten()[slots].tolist()
    place = 0
    for number, weight in enumerate(weights.tolist()):
        new = (
            number == 0
            or block[number] != block[number - 1]
            or slots[number] - 1 != slots[number - 1]
        )
        place = 0 if new else place + 1
        assert weight == 0.5**place


def test_bf16_gradients_of_the_matrix_are_summed_in_fp32(batch, leaves, monkeypatch):
    """One row a piece: summed in bf16, the gradient would lose what many small parts add."""
    monkeypatch.setattr(module, "FEWEST_ROWS", 1)
    monkeypatch.setitem(module.PIECE_ELEMENTS, "cpu", VOCABULARY)
    objective = ObjectiveConfig()
    halves = [leaf.detach().bfloat16().requires_grad_() for leaf in leaves]
    targets = make_targets(batch, objective, *counted(batch, objective))
    loss, _ = head_loss(*halves, targets)
    hidden, weight = torch.autograd.grad(loss, halves)
    assert hidden.dtype == weight.dtype == torch.bfloat16
    wholes = [half.detach().float().requires_grad_() for half in halves]
    expected = torch.autograd.grad(plain(*wholes, batch, objective), wholes)
    for own, other in zip((hidden, weight), expected, strict=True):
        assert float((own.float() - other).norm() / other.norm()) < 0.01


def test_the_mix_follows_the_step():
    objective = ObjectiveConfig(
        agreement="tv", agreement_weight=0.8, agreement_from_step=10, agreement_ramp_steps=4
    )
    weights = [objective.at(step).agreement_weight for step in (0, 9, 10, 11, 12, 14, 99)]
    assert weights == pytest.approx([0, 0, 0, 0.2, 0.4, 0.8, 0.8])
    assert ObjectiveConfig().at(3) == ObjectiveConfig()
    at_once = ObjectiveConfig(agreement="kl", agreement_weight=0.5)
    assert at_once.at(0).agreement_weight == 0.5
