"""Every backend against the dense mask: outputs, gradients, and what is left out."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from data_prep.layout import build_layout
from pipeline.model.attention import attend, is_causal, training_mask
from pipeline.model.config import CHECKPOINTING, ModelConfig
from pipeline.model.flex import TILE as FLEX_TILE
from pipeline.model.flex import FlexMask, tile_table
from pipeline.model.mask import Spans, layout_spans
from pipeline.model.tiles import TILE, TiledMask
from pipeline.model.transformer import Transformer

BATCHES = {
    "one document": ([[256]], 8, {}),
    "packed": ([[30, 150, 20], [64, 136]], 8, {"shift": True}),
    "odd lengths": ([[1, 230, 1], [232]], 5, {"shift": True}),
    "quarter coverage": ([[100, 156], [256]], 16, {"coverage": 0.25}),
    "padded": ([[90, 38], [128]], 4, {"shift": True, "coverage": 0.6}),
    "shorter than a tile": ([[9, 3], [12]], 4, {}),
    "blocks longer than a tile": ([[300]], 2 * TILE + 7, {"shift": True}),
    "one block of two tiles": ([[256]], 2 * FLEX_TILE, {}),
    "many tiles": ([[1100], [500, 600]], 16, {}),
}
CAUSAL = ("packed", "odd lengths", "padded", "one block of two tiles")
"""Those that are tested with causal slots as well."""


def make_spans(lengths_of_sequences, block_size, options, padding=0) -> Spans:
    """A batch's spans; `padding` tokens stand at the end of each sequence, without blocks."""
    rng = np.random.default_rng(0)
    layouts = [build_layout(x, block_size, rng=rng, **options) for x in lengths_of_sequences]
    slots = max(layout.num_slots for layout in layouts) + 3
    rows = [
        layout_spans([*lengths, padding] if padding else lengths, layout, slots)
        for lengths, layout in zip(lengths_of_sequences, layouts, strict=True)
    ]
    return Spans(*(torch.from_numpy(part) for part in np.stack(rows, axis=1)))


@pytest.fixture(params=[*((name, False) for name in BATCHES), *((name, True) for name in CAUSAL)])
def spans(request) -> Spans:
    """Each batch with slots that see all of their block, and some with slots that do not."""
    name, causal_slots = request.param
    made = make_spans(*BATCHES[name], padding=11 if name == "padded" else 0)
    return replace(made, causal_slots=causal_slots)


CPU = torch.device("cpu")


@pytest.mark.parametrize("backend", ["tiles", "flex"])
def test_backends_equal_the_dense_mask_with_gradients(spans, backend, monkeypatch):
    # FlexAttention refuses gradients on a CPU, although its reference computes them.
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    generator = torch.Generator().manual_seed(0)
    batch, length = spans.block.shape

    def leaf(heads: int) -> torch.Tensor:
        x = torch.randn(batch, heads, length, 8, generator=generator, dtype=torch.float64)
        return x.requires_grad_()

    inputs = leaf(4), leaf(2), leaf(2)
    weight = torch.randn(batch, 4, length, 8, generator=generator, dtype=torch.float64)
    results = []
    for form in ("dense", backend):
        output = attend(*inputs, training_mask(spans, CPU, form))
        results.append((output, *torch.autograd.grad(output, inputs, weight)))
    for dense, sparse in zip(*results, strict=True):
        torch.testing.assert_close(sparse, dense, rtol=1e-10, atol=1e-10)


def clean_tokens(spans: Spans) -> int:
    return int((spans.block[0] < 0).sum())


def test_tiles_of_the_kernel_hold_every_allowed_pair(spans):
    """Visited where any pair is allowed, and unchecked only where all are."""
    some, every = tile_table(spans, clean_tokens(spans))
    dense = spans.dense()
    missing = -dense.shape[-1] % FLEX_TILE
    padded = torch.nn.functional.pad(dense, (0, missing, 0, missing))
    cut = padded.unflatten(2, (-1, FLEX_TILE)).unflatten(1, (-1, FLEX_TILE))
    assert not (cut.any(4).any(2) & ~some).any()
    assert not (every & ~cut.all(4).all(2)).any()
    assert not (every & ~some).any()


def test_cost_of_the_kernel_follows_the_table():
    def visited(lengths, block_size, **options):
        spans = make_spans([lengths], block_size, options)
        return int(FlexMask.from_spans(spans, clean_tokens(spans)).computed_tiles)

    full, side = visited([2048], 16), 2048 // FLEX_TILE
    # The triangle of the clean section, as much again for prefixes, and the diagonal of blocks;
    # a spare slot or three make one more row of tiles.
    assert full <= side * (side + 1) + side + 2 * side
    assert visited([2048], 16, coverage=0.25) < 0.7 * full
    assert visited([128] * 16, 16) < 0.2 * full


def test_unchecked_tiles_are_found():
    """In a long document all tiles off the diagonals are whole: no pair of them is looked at."""
    spans = make_spans([[1024]], 16, {})
    _, every = tile_table(spans, 1024)
    side = 1024 // FLEX_TILE
    assert int(every[0, :side].sum()) == side * (side - 1) // 2
    blocks = make_spans([[512]], 256, {})
    _, every = tile_table(blocks, 512)
    assert bool(every[0, 4:8, 4:8].any())  # slots of one long block see each other wholly
    some, every = tile_table(replace(blocks, causal_slots=True), 512)
    own = torch.tensor([[0, 0], [1, 0]], dtype=torch.bool)
    assert torch.equal(every[0, 4:8, 4:8], torch.block_diag(own, own))
    assert not some[0, 4:8, 4:8].triu(1).any(), "nothing is looked at that stands later"


def test_masks_of_one_shape_compile_once():
    """What compilation sees of a mask must not depend on the batch, or each would recompile."""
    from torch._dynamo.testing import CompileCounter
    from torch.nn.attention.flex_attention import flex_attention

    counter = CompileCounter()
    compiled = torch.compile(flex_attention, backend=counter, dynamic=False)
    x = torch.randn(1, 2, 259, 16)
    for lengths, shift in (([128], False), ([30, 98], True), ([1, 126, 1], True)):
        spans = make_spans([lengths], 8, {"shift": shift})
        mask = FlexMask.from_spans(spans, 128)
        got = compiled(x, x, x, block_mask=mask.tiles)
        expected = attend(x, x, x, spans.dense().unsqueeze(1))
        torch.testing.assert_close(got, expected)
    assert counter.frame_count == 1


def test_autoregressive_batches_of_one_document_need_no_mask():
    def spans_of(lengths):
        rows = layout_spans(lengths, build_layout(lengths, 8), 256)[:, None, :256]
        return Spans(*(torch.from_numpy(part) for part in rows))

    assert training_mask(spans_of([256]), CPU) is None
    assert isinstance(training_mask(spans_of([100, 156]), CPU), TiledMask)
    assert not is_causal(make_spans([[256]], 8, {}))
    with pytest.raises(ValueError, match="backend must be one of"):
        training_mask(spans_of([256]), CPU, "triton")


def allowed_by(tiled: TiledMask, batch: int, length: int) -> torch.Tensor:
    """How often tiles and blocks together let a row see a key, int64 [batch, length, length]."""
    times = torch.zeros(batch, length, length, dtype=torch.int64)
    for tile in tiled.tiles:
        part = times[tile.sequences, tile.rows, tile.keys]
        causal = part.new_ones(part.shape[1:]).tril()
        part += causal if tile.bias is None else (tile.bias == 0)[:, 0]
    if tiled.blocks is not None:
        place = torch.arange(batch * length)
        for slots, bias in zip(tiled.blocks.slots[:, 0], tiled.blocks.bias[:, 0], strict=True):
            for row, column in (bias == 0).nonzero().tolist():
                row, column = place[slots[row]], place[slots[column]]
                assert row // length == column // length, "a block lies in one sequence"
                times[row // length, row % length, column % length] += 1
    return times


def test_tiles_hold_every_allowed_pair_once(spans):
    """Put back in place, tiles and blocks are the dense mask: nothing allowed lies outside."""
    tiled = TiledMask.from_spans(spans)
    assert torch.equal(allowed_by(tiled, *spans.block.shape), spans.dense().long())


def test_autoregressive_batches_have_tiles_of_one_section():
    rows = layout_spans([100, 156], build_layout([100, 156], 8), 256)[:, None, :256]
    spans = Spans(*(torch.from_numpy(part) for part in rows))
    tiled = TiledMask.from_spans(spans)
    assert [tile.rows for tile in tiled.tiles] == [slice(n, n + TILE) for n in range(0, 256, TILE)]
    assert all(tile.bias is not None for tile in tiled.tiles), "tiles are as fine as documents"
    assert tiled.blocks is None
    x = torch.randn(1, 2, 256, 8, generator=torch.Generator().manual_seed(0))
    expected = attend(x, x, x, spans.dense().unsqueeze(1))
    torch.testing.assert_close(attend(x, x, x, tiled), expected)


def clean_documents(tiled: TiledMask) -> list[tuple[int, int]]:
    """Sequence and length of the documents that have a tile of their own, in order."""
    own = [tile for tile in tiled.tiles if tile.bias is None]
    return [(tile.sequences.start, tile.rows.stop - tile.rows.start) for tile in own]


@pytest.mark.parametrize("coverage", [None, 0.25])
def test_documents_of_long_sections_have_calls_of_their_own(coverage):
    """Those of each sequence, padding as one more; not where they are many and short."""
    lengths = [[900, 1, 320], [1221]]
    options = {"coverage": coverage} if coverage else {}
    spans = make_spans(lengths, 8, options, padding=11)
    tiled = TiledMask.from_spans(spans)
    assert clean_documents(tiled) == [(0, 900), (0, 1), (0, 320), (0, 11), (1, 1221), (1, 11)]
    x = torch.randn(2, 2, spans.block.shape[1], 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(attend(x, x, x, tiled), attend(x, x, x, spans.dense()[:, None]))
    assert clean_documents(TiledMask.from_spans(make_spans([[8] * 260], 8, options))) == []


def test_tiles_compute_less_than_a_third_of_the_dense_mask():
    spans = make_spans([[1024]], 8, {})
    tiled = TiledMask.from_spans(spans)
    (whole,) = (tile for tile in tiled.tiles if tile.bias is None)
    assert (whole.rows, whole.keys) == (slice(0, 1024), slice(0, 1024))
    entries = 1024 * 1024 // 2 + tiled.blocks.bias.numel()
    entries += sum(tile.bias[0].numel() for tile in tiled.tiles if tile.bias is not None)
    assert entries < 0.3 * spans.dense().numel()


def test_gradients_need_no_memory_of_what_tiles_see():
    """The backward pass keeps inputs and output alone, so a tile's keys are never copied."""
    spans = make_spans([[1024]], 8, {})
    x = torch.randn(1, 2, spans.block.shape[1], 8, requires_grad=True)
    kept: list[int] = []

    def count(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        attend(x, x, x, TiledMask.from_spans(spans))
    assert sum(kept) == 4 * x.numel() + x.numel() // 8


@pytest.mark.parametrize("activation_checkpointing", CHECKPOINTING)
def test_a_model_takes_either_form(activation_checkpointing):
    spans = make_spans(*BATCHES["packed"])
    config = ModelConfig(
        hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=1,
        head_dim=8, vocab_size=11,
    )  # fmt: skip
    model = Transformer(config).initialize(0).double().train()
    model.checkpoint_activations(activation_checkpointing)
    tokens = torch.randint(0, 11, spans.block.shape, generator=torch.Generator().manual_seed(0))
    losses = []
    for mask in (spans.dense().unsqueeze(1), training_mask(spans, CPU)):
        loss = model(tokens, mask=mask).square().sum()
        losses.append((loss, *torch.autograd.grad(loss, tuple(model.parameters()))))
    for dense, tiled in zip(*losses, strict=True):
        torch.testing.assert_close(tiled, dense, rtol=1e-9, atol=1e-9)
