"""The attention rule against the rule written out, and what follows from it in the model."""

import numpy as np
import pytest
import torch

from data_prep.layout import Layout, build_layout
from pipeline.model.attention import training_mask
from pipeline.model.config import ModelConfig
from pipeline.model.mask import Spans, dense_mask, layout_spans
from pipeline.model.transformer import Transformer

LAYOUTS = [
    ([7], 3, {}),
    ([4, 1, 6], 4, {}),
    ([5, 9, 2], 3, {"shift": True}),
    ([12, 7], 4, {"coverage": 0.5}),
    ([3, 3, 3], 1, {}),
    ([2, 5], 8, {}),
]


def rule(document_lengths: list[int], layout: Layout, causal_slots: bool = False) -> torch.Tensor:
    """The method's table, one pair of rows at a time."""
    document = [d for d, length in enumerate(document_lengths) for _ in range(length)]
    rows: list[tuple[str, int, int]] = [("clean", i, -1) for i in range(len(document))]
    for block in range(layout.num_blocks):
        drafted = range(int(layout.prefix_end[block]), int(layout.draft_end[block]))
        rows += [("slot", position, block) for position in drafted]
    allowed = torch.zeros(len(rows), len(rows), dtype=torch.bool)
    for q, (query_kind, i, query_block) in enumerate(rows):
        for k, (key_kind, j, key_block) in enumerate(rows):
            same_document = document[i] == document[j]
            if query_kind == "clean" and key_kind == "clean":
                allowed[q, k] = same_document and j <= i
            elif query_kind == "slot" and key_kind == "clean":
                allowed[q, k] = same_document and j < int(layout.prefix_end[query_block])
            elif query_kind == "slot" and key_kind == "slot":
                seen = j <= i if causal_slots else True
                allowed[q, k] = query_block == key_block and seen
    return allowed


@pytest.mark.parametrize(("lengths", "block_size", "options"), LAYOUTS)
def test_dense_mask_is_the_rule(lengths, block_size, options):
    layout = build_layout(lengths, block_size, rng=np.random.default_rng(1), **options)
    assert torch.equal(dense_mask(lengths, layout), rule(lengths, layout))
    assert torch.equal(dense_mask(lengths, layout, True), rule(lengths, layout, True))


@pytest.mark.parametrize(("lengths", "block_size", "options"), LAYOUTS)
@pytest.mark.parametrize("spare", [0, 5])
@pytest.mark.parametrize("causal", [False, True])
def test_spans_say_the_same_and_spare_slots_see_only_themselves(
    lengths, block_size, options, spare, causal
):
    layout = build_layout(lengths, block_size, rng=np.random.default_rng(2), **options)
    rows = layout_spans(lengths, layout, layout.num_slots + spare)
    spans = Spans(*(torch.from_numpy(part) for part in rows), causal_slots=causal)
    got = spans.to(torch.device("cpu")).dense()
    used = sum(lengths) + layout.num_slots
    expected = torch.eye(used + spare, dtype=torch.bool)
    expected[:used, :used] = rule(lengths, layout, causal)
    assert torch.equal(got, expected)


def test_random_layouts():
    rng = np.random.default_rng(3)
    for _ in range(20):
        lengths = rng.integers(1, 12, size=rng.integers(1, 5)).tolist()
        layout = build_layout(
            lengths,
            int(rng.integers(1, 6)),
            coverage=float(rng.choice([0.3, 1.0])),
            shift=bool(rng.integers(2)),
            rng=rng,
        )
        rows = layout_spans(lengths, layout, layout.num_slots)
        expected = rule(lengths, layout)
        assert torch.equal(dense_mask(lengths, layout), expected)
        assert torch.equal(Spans(*map(torch.from_numpy, rows)).dense(), expected)


def test_too_few_slots_is_refused():
    layout = build_layout([6], 2)
    with pytest.raises(ValueError, match="needs 6 slots, 5 were given"):
        layout_spans([6], layout, 5)


def mixed_blocks() -> Layout:
    """Blocks of 3, 1, 2 and 4 positions in documents of 6 and 7 tokens, some not drafted."""
    return Layout.from_table([[0, 1, 4, 0], [0, 5, 6, 3], [6, 6, 8, 4], [6, 9, 13, 6]])


ISOLATION = {
    "shifted": ([5, 4], {"block_size": 2, "shift": True}),
    "partial": ([9, 5], {"block_size": 3, "coverage": 0.5}),
    "partial and shifted": ([8, 6], {"block_size": 3, "coverage": 0.6, "shift": True}),
    "three documents": ([4, 1, 6], {"block_size": 3}),
    "blocks longer than documents": ([2, 3, 3], {"block_size": 8}),
    "mixed block lengths": ([6, 7], {}),
}


@pytest.mark.parametrize("backend", ["dense", "tiles", "flex"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ISOLATION)
def test_only_allowed_inputs_change_a_logit(backend, name, causal):
    """Change one input at a time: a row's logits move iff the rule lets it see that column.

    With two layers attention is followed further, so the reach is the rule's transitive closure.
    """
    lengths, options = ISOLATION[name]
    if options:
        layout = build_layout(lengths, rng=np.random.default_rng(0), **options)
    else:
        layout = mixed_blocks()
    clean = sum(lengths)
    allowed = rule(lengths, layout, causal)
    reach = (allowed.float() @ allowed.float()) > 0
    config = ModelConfig(
        hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=1,
        head_dim=8, vocab_size=11,
    )  # fmt: skip
    model = Transformer(config).initialize(0).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(10)
    rows = layout_spans(lengths, layout, layout.num_slots)[:, None]
    spans = Spans(*(torch.from_numpy(part) for part in rows), causal_slots=causal)
    mask = training_mask(spans, torch.device("cpu"), backend)
    tokens = torch.randint(0, 11, (1, len(allowed)), generator=torch.Generator().manual_seed(0))
    position = torch.cat([torch.arange(clean), torch.from_numpy(layout.slot_position).long()])
    with torch.no_grad():
        base = model(tokens, position, mask)
        for column in range(len(allowed)):
            changed = tokens.clone()
            changed[0, column] = (changed[0, column] + 1) % 11
            moved = (model(changed, position, mask) - base).abs().amax(-1)[0] > 1e-9
            assert torch.equal(moved, reach[:, column]), column
