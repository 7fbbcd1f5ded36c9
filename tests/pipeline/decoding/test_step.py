"""The queries of a step: masks, positions, and that they are what training showed."""

import pytest
import torch
from decoding_models import CPU, MASK, make_model

from data_prep.layout import Layout
from pipeline.decoding.cache import KVCache
from pipeline.decoding.step import (
    StepRule,
    StepShape,
    num_queries,
    prefill_mask,
    step_mask,
    step_positions,
)
from pipeline.model.mask import dense_mask

SHAPES = [
    StepShape.full(1),
    StepShape.full(2),
    StepShape.full(3),
    StepShape.full(5),
    StepShape(4, 4, (1, 4)),
    StepShape(3, 3, (1,)),
    StepShape(4),
    StepShape(1),
    StepShape(4, 4, (1, 3)).short,
    StepShape.one_block(1),
    StepShape.one_block(4),
    StepShape.one_block(4).short,
    StepShape(3, 5, (1,), True, True),
]


def written_out(shape: StepShape, prefix: int, causal: bool = False) -> torch.Tensor:
    """Who sees whom in a decoding step; columns: prefix, drafts, blocks."""
    rows = [("draft", i, 0) for i in range(shape.tokens)]
    size = 2 * shape.block_size - 1 if shape.linear else shape.block_size
    rows += [("slot", t, j) for j in shape.blocks for t in range(size)]
    sees = torch.zeros(len(rows), prefix + len(rows), dtype=torch.bool)
    sees[:, :prefix] = True
    for q, (kind, index, block) in enumerate(rows):
        for k, (other, key_index, key_block) in enumerate(rows):
            if kind == "draft":
                seen = other == "draft" and key_index <= index
            elif other == "draft":
                seen = key_index < block
            else:
                seen = key_block == block and (key_index <= index or not causal)
            sees[q, prefix + k] = seen
    return sees


def allowed(bias: torch.Tensor) -> torch.Tensor:
    """The pairs that a bias leaves; it holds nothing but 0 and -inf."""
    assert ((bias == 0) | (bias == -torch.inf)).all()
    return bias == 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("causal", [False, True])
def test_step_mask_is_the_rule(shape, causal):
    mask = step_mask(shape, 9, CPU, causal)
    assert len(mask) == shape.num_queries
    rule = StepRule(shape, 9, CPU, torch.float32, causal)
    for prefix in (0, 4, 9):
        assert torch.equal(mask[:, 9 - prefix :], written_out(shape, prefix, causal))
        assert torch.equal(allowed(rule.over_prefix(prefix)), written_out(shape, prefix, causal))
    positions = step_positions(shape, CPU)
    assert positions[: shape.tokens].tolist() == list(range(shape.tokens))
    for accepted in range(1, shape.tokens + 1) if shape.linear else shape.blocks:
        expected = list(range(accepted, accepted + shape.block_size))
        assert positions[shape.block_rows(accepted)].tolist() == expected


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("causal", [False, True])
def test_rows_of_different_lengths_see_their_own_prefix_and_nothing_behind(shape, causal):
    lengths = [0, 5, 2]
    width = 5 + shape.num_queries + 3
    rule = StepRule(shape, 30, CPU, torch.float32, causal)
    mask = allowed(rule.over_lengths(torch.tensor(lengths), torch.arange(width)))
    assert mask.shape == (3, 1, shape.num_queries, width)
    for row, length in zip(mask[:, 0], lengths, strict=True):
        used = length + shape.num_queries
        assert torch.equal(row[:, :used], written_out(shape, length, causal))
        assert not row[:, used:].any()


def test_num_queries():
    assert [num_queries(size) for size in (1, 4, 8)] == [2, 20, 72]
    assert StepShape(8, 8, (1, 2, 8)).num_queries == 8 + 3 * 8
    assert StepShape(8, 8, (1, 2, 8)).block_starts() == [-1, 8, 16, -1, -1, -1, -1, -1, 24]
    one = StepShape.one_block(4)
    assert (one.num_queries, one.short.num_queries, one.prefill_slots) == (4 + 7, 1 + 7, 7)
    assert one.block_starts() == [-1, 4, 5, 6, 7]
    assert one.block_rows(4).stop == one.num_queries, "the last slot is read, and none is spare"
    without = StepShape(4, 4, (), True, True)
    assert (without.num_queries, without.prefill_slots) == (4, 0)
    assert without.block_starts() == [-1] * 5


@pytest.mark.parametrize("blocks", [(0,), (2, 1), (1, 1), (5,)])
def test_impossible_blocks_are_refused(blocks):
    with pytest.raises(ValueError, match="increasing numbers in 1 … 4"):
        StepShape(4, 4, blocks)


def test_a_linear_step_has_no_other_block():
    with pytest.raises(ValueError, match=r"a linear step has block 1 or none, got \(1, 2\)"):
        StepShape(4, 4, (1, 2), True, True)


@pytest.mark.parametrize("accepted", [1, 2, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_a_step_sees_what_training_showed(accepted, causal):
    """Block j of a step has the logits that the training forward gives that block's slots."""
    model, block_size, tokens = make_model(causal_slots=causal), 3, [1, 4, 2, 8, 5, 7, 3]
    prefix = len(tokens) - block_size
    shape = StepShape.full(block_size)
    step = torch.tensor([tokens[prefix:] + [MASK] * block_size**2])
    cache = KVCache(model.config, 64, dtype=torch.float32, device=CPU)
    with torch.no_grad():
        model(torch.tensor([tokens[:prefix]]), cache=cache)
        cache.keep(prefix)
        positions = prefix + step_positions(shape, CPU)
        rule = StepRule(shape, 64, CPU, torch.float32, model.config.causal_slots)
        got = model(step, positions, rule.over_prefix(prefix), cache)[0]
        start = prefix + accepted
        clean = tokens[:start] + [0] * block_size
        layout = Layout.from_table([[0, start, start + block_size, 0]])
        ids = torch.tensor([clean + [MASK] * block_size])
        position = torch.cat([torch.arange(len(clean)), torch.arange(start, start + block_size)])
        expected = model(ids, position, dense_mask([len(clean)], layout, causal))[0]
    block = got[shape.block_rows(accepted)]
    torch.testing.assert_close(block, expected[len(clean) :], atol=2e-5, rtol=1e-5)
    drafts = expected[prefix : prefix + accepted]
    torch.testing.assert_close(got[:accepted], drafts, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_a_linear_step_sees_what_training_showed(causal):
    """Its block has the logits of a training block of 2K - 1 slots that begins behind d_0."""
    model, size, tokens = make_model(causal_slots=causal), 3, [1, 4, 2, 8, 5, 7, 3]
    prefix, shape, slots = len(tokens) - size, StepShape.one_block(3), 2 * 3 - 1
    step = torch.tensor([tokens[prefix:] + [MASK] * slots])
    cache = KVCache(model.config, 64, dtype=torch.float32, device=CPU)
    model(torch.tensor([tokens[:prefix]]), cache=cache)
    cache.keep(prefix)
    rule = StepRule(shape, 64, CPU, torch.float32, causal)
    got = model(step, prefix + step_positions(shape, CPU), rule.over_prefix(prefix), cache)[0]
    start = prefix + 1
    clean = tokens[:start] + [0] * slots
    layout = Layout.from_table([[0, start, start + slots, 0]])
    position = torch.cat([torch.arange(len(clean)), torch.arange(start, start + slots)])
    mask = dense_mask([len(clean)], layout, causal)
    expected = model(torch.tensor([clean + [MASK] * slots]), position, mask)[0]
    torch.testing.assert_close(got[size:], expected[len(clean) :], atol=2e-5, rtol=1e-5)


def test_prefill_mask():
    assert prefill_mask(0, 3, 2, CPU).int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1],
    ]
    assert torch.equal(prefill_mask(0, 3, 2, CPU, True), torch.ones(5, 5).bool().tril())
    assert prefill_mask(2, 1, 1, CPU).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
