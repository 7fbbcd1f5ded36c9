"""Attention by tiles against the dense mask: outputs, gradients, and what the tiles leave out."""

import numpy as np
import pytest
import torch

from data_prep.layout import build_layout
from pipeline.model.attention import TILE, TiledMask, attend, training_mask
from pipeline.model.config import ModelConfig
from pipeline.model.mask import Spans, layout_spans
from pipeline.model.transformer import Transformer

BATCHES = {
    "one document": ([[256]], 8, {}),
    "packed": ([[30, 150, 20], [64, 136]], 8, {"shift": True}),
    "odd lengths": ([[1, 230, 1], [232]], 5, {"shift": True}),
    "quarter coverage": ([[100, 156], [256]], 16, {"coverage": 0.25}),
    "padded": ([[90, 38], [128]], 4, {"shift": True, "coverage": 0.6}),
    "shorter than a tile": ([[9, 3], [12]], 4, {}),
    "blocks longer than a tile": ([[300]], 2 * TILE + 7, {"shift": True}),
    "many tiles": ([[1100], [500, 600]], 16, {}),
}


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


@pytest.fixture(params=BATCHES)
def spans(request) -> Spans:
    return make_spans(*BATCHES[request.param], padding=11 if request.param == "padded" else 0)


def test_tiles_equal_the_dense_mask_with_gradients(spans):
    generator = torch.Generator().manual_seed(0)
    batch, length = spans.block.shape

    def leaf(heads: int) -> torch.Tensor:
        x = torch.randn(batch, heads, length, 8, generator=generator, dtype=torch.float64)
        return x.requires_grad_()

    inputs = leaf(4), leaf(2), leaf(2)
    weight = torch.randn(batch, 4, length, 8, generator=generator, dtype=torch.float64)
    results = []
    for mask in (spans.dense().unsqueeze(1), TiledMask.from_spans(spans)):
        output = attend(*inputs, mask)
        results.append((output, *torch.autograd.grad(output, inputs, weight)))
    for dense, tiled in zip(*results, strict=True):
        torch.testing.assert_close(tiled, dense, rtol=1e-10, atol=1e-10)


def test_tiles_hold_every_allowed_pair_once(spans):
    """Put back in place, the tiles are the dense mask: nothing allowed lies outside of them."""
    dense = spans.dense()
    rebuilt = torch.zeros_like(dense)
    tiled = TiledMask.from_spans(spans)
    column = torch.arange(dense.shape[-1])
    clean, slots = column[: tiled.clean_tokens], column[tiled.clean_tokens :]
    start = 0
    for tile in tiled.tiles:
        parts = (clean.split(TILE)[tile.clean], slots.split(TILE)[tile.slots])
        columns = torch.cat([piece for part in parts for piece in part])
        rebuilt[:, start : start + tile.rows, columns] = tile.mask[:, 0]
        start += tile.rows
    assert start == dense.shape[-1]
    assert torch.equal(rebuilt, dense)


def test_autoregressive_batches_have_tiles_of_one_section():
    rows = layout_spans([100, 156], build_layout([100, 156], 8), 256)[:, None, :256]
    spans = Spans(*(torch.from_numpy(part) for part in rows))
    tiled = TiledMask.from_spans(spans)
    assert [tile.rows for tile in tiled.tiles] == [TILE] * 4
    x = torch.randn(1, 2, 256, 8, generator=torch.Generator().manual_seed(0))
    expected = attend(x, x, x, spans.dense().unsqueeze(1))
    torch.testing.assert_close(attend(x, x, x, tiled), expected)


def test_tiles_compute_less_than_half_of_the_dense_mask():
    spans = make_spans([[1024]], 8, {})
    entries = sum(tile.mask[0].numel() for tile in TiledMask.from_spans(spans).tiles)
    assert entries < 0.35 * spans.dense().numel()


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_a_model_takes_either_form(activation_checkpointing):
    spans = make_spans(*BATCHES["packed"])
    config = ModelConfig(
        hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=1,
        head_dim=8, vocab_size=11,
    )  # fmt: skip
    model = Transformer(config).initialize(0).double().train()
    model.model.activation_checkpointing = activation_checkpointing
    tokens = torch.randint(0, 11, spans.block.shape, generator=torch.Generator().manual_seed(0))
    losses = []
    for mask in (spans.dense().unsqueeze(1), training_mask(spans)):
        loss = model(tokens, mask=mask).square().sum()
        losses.append((loss, *torch.autograd.grad(loss, tuple(model.parameters()))))
    for dense, tiled in zip(*losses, strict=True):
        torch.testing.assert_close(tiled, dense, rtol=1e-9, atol=1e-9)
