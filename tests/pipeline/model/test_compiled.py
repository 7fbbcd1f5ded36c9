"""Layers under torch.compile: the same numbers, one compilation, whatever stands in a batch."""

from functools import partial

import pytest
import torch
from small_models import small_config
from torch._dynamo.testing import CompileCounter

from data_prep.layout import build_layout
from pipeline.model import compiled, flex
from pipeline.model.attention import attend, training_mask
from pipeline.model.config import CHECKPOINTING
from pipeline.model.flex import FlexMask
from pipeline.model.mask import Spans, layout_spans
from pipeline.model.transformer import Transformer

CPU = torch.device("cpu")
LENGTHS = ([96], [30, 66], [1, 94, 1])


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def spans_of(lengths: list[int]) -> Spans:
    rows = layout_spans(lengths, build_layout(lengths, 8), 96)[:, None]
    return Spans(*(torch.from_numpy(part) for part in rows))


def gradients(model: Transformer, tokens: torch.Tensor, mask) -> list[torch.Tensor]:
    loss = model(tokens, mask=mask).square().mean()
    return [loss, *torch.autograd.grad(loss, tuple(model.parameters()))]


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_compiled_layers_give_the_same_gradients(checkpointing):
    config = small_config("qwen2", num_layers=3)
    plain = Transformer(config).initialize(0).double().train()
    fused = Transformer(config).initialize(0).double().train()
    fused.checkpoint_activations(checkpointing)
    for layer in fused.model.layers:
        layer.compile(backend="aot_eager", dynamic=False)
    for lengths in LENGTHS:
        mask = training_mask(spans_of(lengths), CPU)
        tokens = torch.randint(0, 300, (1, 192), generator=torch.Generator().manual_seed(0))
        for ours, theirs in zip(
            gradients(fused, tokens, mask), gradients(plain, tokens, mask), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_layers_share_one_graph_and_batches_do_not_compile_anew():
    """With the mask of a GPU: its tables are inputs of the graph, not part of it."""
    config = small_config("qwen3", num_layers=3, head_dim=16)
    model = Transformer(config).initialize(0).eval()
    expected = Transformer(config).initialize(0).eval()
    counter = CompileCounter()
    for layer in model.model.layers:
        layer.compile(backend=counter, dynamic=False)
    tokens = torch.randint(0, 300, (1, 192))
    with torch.no_grad():
        for lengths in LENGTHS:
            spans = spans_of(lengths)
            got = model(tokens, mask=FlexMask.from_spans(spans, 96))
            dense = expected(tokens, mask=spans.dense().unsqueeze(1))
            torch.testing.assert_close(got, dense, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.long
def test_the_compiled_kernel_of_this_machine_equals_the_dense_mask():
    """Inductor's own FlexAttention, forward alone on a CPU, over real tables of tiles."""
    kernel = torch.compile(torch.nn.attention.flex_attention.flex_attention, dynamic=False)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, h, 192, 16, generator=generator) for h in (4, 2, 2))
    for lengths in LENGTHS:
        spans = spans_of(lengths)
        mask = FlexMask.from_spans(spans, 96)
        with torch.no_grad():
            got = kernel(query, key, value, block_mask=mask.tiles, enable_gqa=True)
            expected = attend(query, key, value, spans.dense().unsqueeze(1))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_compiled_layers_train_on_this_machine():
    model = Transformer(small_config()).initialize(0).train().compile_layers()
    plain = Transformer(small_config()).initialize(0).train()
    tokens = torch.randint(0, 300, (1, 192))
    mask = training_mask(spans_of([30, 66]), CPU)
    for ours, theirs in zip(
        gradients(model, tokens, mask), gradients(plain, tokens, mask), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


@torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False)
def test_scoring_leaves_training_its_recompilations(monkeypatch):
    """Many lengths of scored text, and a shape of training after them is compiled all the same;
    too many are an error, not attention that holds all scores."""
    counter = CompileCounter()
    monkeypatch.setattr(compiled, "RECOMPILE_LIMIT", 3)
    monkeypatch.setattr(flex.torch, "compile", partial(torch.compile, backend=counter))
    flex._compiled.cache_clear()
    scoring, training = flex._compiled(False), flex._compiled(True)

    def attend_over(kernel, length: int) -> None:
        x = torch.randn(1, 1, length, 16)
        kernel(x, x, x, block_mask=None)

    try:
        for length in (128, 256, 384):
            attend_over(scoring, length)
        assert counter.frame_count == 3
        attend_over(training, 512)
        assert counter.frame_count == 4
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            attend_over(scoring, 640)
    finally:
        flex._compiled.cache_clear()
