"""The piecewise loss against autograd over whole logits, written out plainly."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dense_objective import dense_loss
from torch.utils.flop_counter import FlopCounterMode

from data_prep.formats.groups import PackedSequence
from data_prep.layout import build_layout
from pipeline.data.batch import make_batch
from pipeline.objective import head_loss as module
from pipeline.objective.head_loss import head_loss, piece_slices, prefix_shares, unpack
from pipeline.objective.loss import (
    MEASURED,
    ObjectiveConfig,
    drafted_places,
    make_targets,
    place_weights,
    verifying_rows,
)

VOCABULARY, WIDTH = 23, 6
OBJECTIVES = {
    "published": ObjectiveConfig(alpha=0.7),
    "ar twin": ObjectiveConfig("ar"),
    "smoothed": ObjectiveConfig(label_smoothing=0.1, alpha=3.3),
    "by position": ObjectiveConfig(alpha=0.3, position_decay=0.8, alone_weight=0.4),
    "uniform, AR frozen": ObjectiveConfig(alpha=0.0, place_weights="uniform"),
    "tv": ObjectiveConfig(agreement="tv", agreement_weight=0.6, position_decay=0.9),
    "kl": ObjectiveConfig(agreement="kl", agreement_weight=1.0, label_smoothing=0.05),
    "acceptance": ObjectiveConfig(agreement="acceptance", agreement_weight=0.7),
    "blend": ObjectiveConfig(agreement="blend", agreement_weight=1.0),
    "text kl": ObjectiveConfig(agreement="kl", agreement_weight=0.5, teacher="text"),
    "text tv": ObjectiveConfig(agreement="tv", agreement_weight=0.5, teacher="text"),
    "text acceptance": ObjectiveConfig(
        agreement="acceptance", agreement_weight=0.6, teacher="text", label_smoothing=0.1
    ),
    "text blend": ObjectiveConfig(agreement="blend", agreement_weight=0.8, teacher="text"),
    "dpace": ObjectiveConfig(place_weights="dpace", teacher="text"),
    "dpace of acceptance": ObjectiveConfig(place_weights="dpace", alpha=0.2),
    "auf": ObjectiveConfig(place_weights="auf", teacher="text", label_smoothing=0.1),
    "auf, blend": ObjectiveConfig(place_weights="auf", agreement="blend", agreement_weight=0.5),
}


@pytest.fixture
def batch():
    """Half of the blocks are drafted by the head alone, too."""
    return made_batch(slots=16, alone_share=0.5)


def made_batch(slots, alone_share=0.0):
    """Two sequences with several documents, one of a single token, and padding."""
    rng = np.random.default_rng(0)
    sequences = []
    for lengths, padding in (([7, 1, 8], 0), ([5, 6], 5)):
        layout = build_layout(lengths, 4, shift=True, rng=rng)
        documents = np.array([*lengths, padding] if padding else lengths)
        tokens = rng.integers(0, VOCABULARY, size=16)
        sequences.append(PackedSequence(tokens, documents, layout, padding=padding))
    return make_batch(sequences, 0, slots, alone_share=alone_share)


@pytest.fixture
def leaves(batch):
    return made_leaves(batch)


def made_leaves(batch):
    """Hidden states and a head that are right about two labels in three."""
    generator = torch.Generator().manual_seed(0)
    rows = batch.input_ids.numel() + batch.blocks.slots[batch.blocks.alone].numel()
    hidden = torch.randn(rows, WIDTH, generator=generator)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator)
    knows = torch.rand(len(batch.rows), 1, generator=generator) < 0.66
    hidden[batch.rows] += knows * weight[batch.labels]
    return hidden.requires_grad_(), weight.requires_grad_()


def counted(batch, objective):
    """Twice this batch's own labels, as if another rank held as many."""
    weights = place_weights(batch, objective.position_decay)
    slots = weights[: batch.diffusion_labels].sum(), weights[batch.diffusion_labels :].sum()
    return 2 * batch.ar_labels, *(2 * float(weight) for weight in slots)


def in_small_pieces(monkeypatch, rows=3):
    monkeypatch.setattr(module, "FEWEST_ROWS", 1)
    monkeypatch.setitem(module.PIECE_ELEMENTS, "cpu", rows * VOCABULARY)


def in_sample(batch):
    """Of the AR rows, those at every eighth place of their sequence, from the fifth on."""
    places = range(MEASURED // 2, 16, MEASURED)
    found = [row % batch.input_ids.shape[1] in places for row in batch.rows[: batch.ar_labels]]
    return torch.tensor(found)


def ar_measured(logits, batch, objective):
    """The summed AR loss; where it does not count, what stands for it."""
    losses = F.cross_entropy(
        logits[: batch.ar_labels], batch.labels[: batch.ar_labels], reduction="none"
    )
    if objective.drafts and objective.alpha == 0:
        return losses[in_sample(batch)].sum() * MEASURED
    return losses.sum()


@pytest.mark.parametrize("small", [False, True], ids=["whole", "small pieces"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradients_are_those_of_whole_logits(batch, name, small, monkeypatch):
    if small:
        in_small_pieces(monkeypatch)
    objective = OBJECTIVES[name]
    if not objective.drafts:
        batch = made_batch(slots=0)
    leaves = made_leaves(batch)
    targets = make_targets(batch, objective, *counted(batch, objective))
    pieces = piece_slices(targets, VOCABULARY, "cpu")
    assert len(pieces) > 5 if small else len(pieces) <= 3
    loss, sums = head_loss(*leaves, targets)
    expected = dense_loss(*leaves, batch, objective, counted(batch, objective))
    torch.testing.assert_close(loss, expected)
    # Upstream factors, as DeepSpeed's scaling is one, go through.
    got = torch.autograd.grad(loss * 3.5, leaves)
    for own, other in zip(got, torch.autograd.grad(expected * 3.5, leaves), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-7)
    logits = (leaves[0] @ leaves[1].T)[batch.rows]
    drafted = batch.ar_labels + batch.diffusion_labels
    slots = slice(batch.ar_labels, drafted)
    diffusion = F.cross_entropy(logits[slots], batch.labels[slots], reduction="sum")
    named = unpack(sums)
    torch.testing.assert_close(named.ar, ar_measured(logits, batch, objective))
    torch.testing.assert_close(named.diffusion, diffusion)
    torch.testing.assert_close(named.loss, loss.detach())
    alone = F.cross_entropy(logits[drafted:], batch.labels[drafted:], reduction="sum")
    torch.testing.assert_close(named.alone, alone)


@pytest.mark.parametrize("teacher", ["text", "ar"])
@pytest.mark.parametrize("rule", ["dpace", "auf"])
def test_places_behind_a_bad_draft_count_less(batch, leaves, rule, teacher):
    """The tests above would compare little if all chains were right, or none."""
    objective = ObjectiveConfig(place_weights=rule, teacher=teacher)
    targets = make_targets(batch, objective, *counted(batch, objective))
    found = prefix_shares(*leaves, targets)[batch.ar_labels :] / targets.shares[batch.ar_labels :]
    _, place = drafted_places(batch)
    later, own = found[place > 1], found[place == 0]
    assert torch.equal(own, torch.ones_like(own)), "place 0 is no draft"
    assert len(later.unique()) == 2 if rule == "auf" else len(later.unique()) > 10
    if rule == "auf":
        assert torch.equal(later.unique(), torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("kind", ["tv", "acceptance", "blend", "kl"])
@pytest.mark.parametrize("teacher", ["text", "ar"])
def test_distances_are_finite_without_overlap(batch, leaves, kind, teacher):
    """Logits so far apart that in fp32 p and q share nothing at all."""
    objective = ObjectiveConfig(agreement=kind, agreement_weight=1.0, teacher=teacher)
    hidden, weight = leaves[0].detach() * 300, leaves[1]
    hidden.requires_grad_()
    targets = make_targets(batch, objective, *counted(batch, objective))
    loss, _ = head_loss(hidden, weight, targets)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, (hidden, weight)))


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_only_what_is_asked_for_is_computed(batch, name, needs, monkeypatch):
    """Products of the head: one of each row, one more for each gradient of a row that learns, and
    those that `extra_heads` says."""
    in_small_pieces(monkeypatch)
    objective = OBJECTIVES[name]
    batch = batch if objective.drafts else made_batch(slots=0)
    leaves = made_leaves(batch)
    targets = make_targets(batch, objective, *counted(batch, objective))
    full = torch.autograd.grad(head_loss(*leaves, targets)[0], leaves)
    for leaf, needed in zip(leaves, needs, strict=True):
        leaf.requires_grad_(needed)
    with FlopCounterMode(display=False) as counter:
        loss, _ = head_loss(*leaves, targets)
    drafts = len(batch.rows) - batch.ar_labels
    learning = forward = len(batch.rows)
    if objective.drafts and objective.alpha == 0:
        learning, forward = drafts, drafts + int(in_sample(batch).sum())
    products = forward + sum(needs) * learning + objective.extra_heads * drafts
    assert counter.get_total_flops() == 2 * VOCABULARY * WIDTH * products
    wanted = [leaf for leaf, needed in zip(leaves, needs, strict=True) if needed]
    if wanted:
        expected = [g for g, needed in zip(full, needs, strict=True) if needed]
        for own, other in zip(torch.autograd.grad(loss, wanted), expected, strict=True):
            assert torch.equal(own, other)


def test_frozen_columns_of_the_matrix_get_no_gradient(batch, leaves):
    objective, frozen = OBJECTIVES["blend"], 4
    targets = make_targets(batch, objective, *counted(batch, objective))
    full = torch.autograd.grad(head_loss(*leaves, targets)[0] * 2, leaves)
    with FlopCounterMode(display=False) as counter:
        loss, _ = head_loss(*leaves, targets, frozen)
    hidden, weight = torch.autograd.grad(loss * 2, leaves)
    assert torch.equal(hidden, full[0])
    assert not weight[:, :frozen].any()
    torch.testing.assert_close(weight[:, frozen:], full[1][:, frozen:])
    drafts = len(batch.rows) - batch.ar_labels
    widths = (2 * WIDTH + WIDTH - frozen) * len(batch.rows) + WIDTH * drafts
    assert counter.get_total_flops() == 2 * VOCABULARY * widths


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, 3.3, None])
def test_the_loss_is_the_published_formula(leaves, alpha):
    """Over a global batch of 50 and 60 labels; None is the autoregressive twin."""
    batch = made_batch(slots=16 if alpha is not None else 0)
    objective = ObjectiveConfig("ar") if alpha is None else ObjectiveConfig(alpha=alpha)
    loss, _ = head_loss(*leaves, make_targets(batch, objective, 50, 60.0))
    logits, end = (leaves[0] @ leaves[1].T)[batch.rows], batch.ar_labels
    ar = F.cross_entropy(logits[:end], batch.labels[:end], reduction="sum") / 50
    if alpha is None:
        assert end == len(batch.labels)
        torch.testing.assert_close(loss, ar)
        return
    diffusion = F.cross_entropy(logits[end:], batch.labels[end:], reduction="sum") / 60
    torch.testing.assert_close(loss, (alpha * ar + diffusion) / (1 + alpha))


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
    weights = place_weights(batch, 0.5)
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


@pytest.mark.parametrize("name", ["published", "acceptance", "blend", "dpace of acceptance"])
def test_bf16_gradients_of_the_matrix_are_summed_in_fp32(batch, leaves, name, monkeypatch):
    """One row a piece: summed in bf16, the gradient would lose what many small parts add."""
    in_small_pieces(monkeypatch, rows=1)
    objective = OBJECTIVES[name]
    halves = [leaf.detach().bfloat16().requires_grad_() for leaf in leaves]
    targets = make_targets(batch, objective, *counted(batch, objective))
    loss, _ = head_loss(*halves, targets)
    hidden, weight = torch.autograd.grad(loss, halves)
    assert hidden.dtype == weight.dtype == torch.bfloat16
    wholes = [half.detach().float().requires_grad_() for half in halves]
    dense = dense_loss(*wholes, batch, objective, counted(batch, objective))
    for own, other in zip((hidden, weight), torch.autograd.grad(dense, wholes), strict=True):
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
