"""The gradient of a global batch, however ranks and accumulation rounds divide it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dense_objective import dense_loss

from data_prep.formats.groups import PackedSequence
from data_prep.layout import build_layout
from pipeline.data.batch import make_batch
from pipeline.objective.loss import ObjectiveConfig
from pipeline.training.step import StepInput, accumulate, count_globally

VOCABULARY, WIDTH, LENGTH, K = 23, 6, 16, 4
OBJECTIVES = {
    "published": ObjectiveConfig(),
    "by position": ObjectiveConfig(alpha=3.3, position_decay=0.7, alone_weight=0.3),
    "dpace": ObjectiveConfig(place_weights="dpace", teacher="text"),
    "auf, acceptance": ObjectiveConfig(
        place_weights="auf", agreement="acceptance", agreement_weight=0.5
    ),
    "blend": ObjectiveConfig(agreement="blend", agreement_weight=1.0, alpha=0.0),
}
DOCUMENTS = ([16], [7, 9], [4, 1, 11], [5, 6])


def sequence(number):
    rng = np.random.default_rng(number)
    lengths = DOCUMENTS[number]
    padding = LENGTH - sum(lengths)
    layout = build_layout(lengths, K, shift=True, rng=rng)
    documents = np.array([*lengths, padding] if padding else lengths)
    return PackedSequence(
        rng.integers(0, VOCABULARY, size=LENGTH), documents, layout, padding=padding
    )


class Engine:
    """A model whose hidden states are those of a table, by sequence."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(4, 2 * LENGTH + K * LENGTH, WIDTH, generator=generator)
        self.states = states.requires_grad_()
        self.weight = torch.randn(VOCABULARY, WIDTH, generator=generator, requires_grad=True)
        self.module = SimpleNamespace(frozen_base=False)

    def hidden(self, numbers, batch):
        """The rows of the sequences, then those of blocks that are drafted by the head alone."""
        assert batch.blocks.slots.shape[1] == K
        own = self.states[numbers]
        first = batch.blocks.slots[batch.blocks.alone, 0] // (2 * LENGTH)
        alone = [
            own[order, 2 * LENGTH :][: K * int((first == order).sum())]
            for order in range(len(numbers))
        ]
        return torch.cat([own[:, : 2 * LENGTH].flatten(0, 1), *alone])

    def __call__(self, input_ids, *, then, **_):
        numbers = [n for n in range(4) if any(torch.equal(row[:LENGTH], self.tokens(n))
                                              for row in input_ids)]  # fmt: skip
        return then(self.hidden(numbers, batch_of(numbers)), self.weight)

    @staticmethod
    def tokens(number):
        return torch.from_numpy(sequence(number).tokens)

    def backward(self, loss):
        loss.backward()

    def is_gradient_accumulation_boundary(self):
        return True


def batch_of(numbers):
    return make_batch([sequence(n) for n in numbers], 0, LENGTH, alone_share=0.5)


def gradients(ranks, objective):
    """Averaged over ranks and their rounds, as DeepSpeed does; and the sums of `head_loss`."""
    engine, device = Engine(), torch.device("cpu")
    steps = [StepInput([batch_of(n) for n in rounds], objective) for rounds in ranks]
    own = []
    for step in steps:
        count_globally(step, SimpleNamespace(sum=lambda x: own.append(x) or x))
    total = np.sum(own, axis=0).tolist()
    counts = count_globally(steps[0], SimpleNamespace(sum=lambda _: total))
    world = SimpleNamespace(size=len(ranks), device=device)
    sums = [accumulate(engine, step, counts, world) for step in steps]
    parts = len(ranks) * len(ranks[0])
    return engine.states.grad / parts, engine.weight.grad / parts, np.sum(sums, axis=0), counts


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_division_of_a_batch_changes_nothing(name):
    objective = OBJECTIVES[name]
    engine, batch = Engine(), batch_of(range(4))
    states, weight, sums, counts = gradients([[[0, 1, 2, 3]]], objective)
    totals = counts.ar_labels, counts.draft_weight, counts.alone_draft_weight
    assert (counts.ar_labels, counts.diffusion_labels) == (batch.ar_labels, batch.diffusion_labels)
    assert counts.alone_labels == batch.alone_labels > 5
    assert counts.teacher_rows == (len(batch.rows) - batch.ar_labels) * objective.extra_heads
    dense = dense_loss(engine.hidden(range(4), batch), engine.weight, batch, objective, totals)
    dense.backward()
    assert sums[0] == pytest.approx(float(dense.detach()), rel=1e-5)
    for own, other in ((states, engine.states.grad), (weight, engine.weight.grad)):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-7)
    for ranks in ([[[0, 1], [2, 3]]], [[[0, 1]], [[2, 3]]], [[[0], [1]], [[2], [3]]]):
        found = gradients(ranks, objective)
        for own, other in zip(found[:2], (states, weight), strict=True):
            torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(found[2], sums, rtol=1e-5)
        assert found[3] == counts
