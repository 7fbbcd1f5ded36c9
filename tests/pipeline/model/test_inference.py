"""The forward of decoding against the model's own, and what it costs in kernels."""

import copy
from collections import Counter

import pytest
import torch
from small_models import small_config
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.decoding.cache import KVCache
from pipeline.decoding.step import StepRule, StepShape
from pipeline.model import inference
from pipeline.model.attention import as_bias, attend, attend_folded, fold_bias
from pipeline.model.config import ADAPTER_TARGETS
from pipeline.model.inference import DecodingForward, joined
from pipeline.model.transformer import Transformer

CPU = torch.device("cpu")
SHAPE = StepShape(3, 4, (1, 3))
KEPT = 5
MASK = 299
VIEWS = (
    "alias", "as_strided", "chunk", "detach", "expand", "flatten", "numpy_T", "permute", "select",
    "slice", "split", "squeeze", "t", "transpose", "unbind", "unflatten", "unsqueeze", "view",
)  # fmt: skip
ADAPTED = {"adapter_rank": 3, "own_mask_embedding": True, "adapter_targets": ADAPTER_TARGETS}
SOME = {**ADAPTED, "adapter_targets": ("k_proj", "up_proj")}


def make_model(family: str, **changes) -> Transformer:
    config = small_config(family, mask_token_id=MASK, block_size=4, **changes)
    model = Transformer(config).initialize(0).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def step_inputs(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A prefix [B, P], and the queries of a step [B, Q]."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(0, 290, (batch, KEPT + SHAPE.tokens), generator=generator)
    slots = torch.full((batch, SHAPE.num_queries - SHAPE.tokens), MASK)
    return text[:, :KEPT], torch.cat([text[:, KEPT:], slots], dim=1)


def run_step(model: Transformer, batch: int, *, fused: bool, ragged: bool) -> list[torch.Tensor]:
    """Hidden states of a step behind a prefix, and what the first layer's cache then holds."""
    prefix, queries = step_inputs(batch)
    dtype = next(model.parameters()).dtype
    cache = KVCache(model.config, 48, dtype=dtype, device=CPU, batch_size=batch, ragged=ragged)
    forward = model.for_decoding(48) if fused else model
    with torch.inference_mode():
        for row in range(batch):
            own = cache.row(row)
            forward.hidden(prefix[row : row + 1], torch.arange(KEPT), None, own)
            cache.set_length(row, KEPT)
        rule = StepRule(SHAPE, 48, CPU, dtype)
        where = cache.positions(rule.offsets)
        hidden = forward.hidden(queries, where, cache.bias(rule), cache, SHAPE.tokens)
    return [hidden, cache.layer(0)[:, :, :, : KEPT + SHAPE.tokens].clone()]


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("changes", [{}, ADAPTED, SOME])
@pytest.mark.parametrize(("batch", "ragged"), [(1, False), (1, True), (3, True)])
def test_it_gives_the_models_own_hidden_states(family, changes, batch, ragged):
    """To rounding: 1e-12 of values around 1 in fp64; in bf16 to a few of its steps."""
    model = make_model(family, **changes)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.bfloat16, 0.15)):
        cast = copy.deepcopy(model).to(dtype)
        plain = run_step(cast, batch, fused=False, ragged=ragged)
        fused = run_step(cast, batch, fused=True, ragged=ragged)
        for ours, theirs in zip(fused, plain, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clean_rows_and_cache_do_not_depend_on_adapters(dtype):
    model = make_model("qwen2", **ADAPTED).to(dtype)
    without = copy.deepcopy(model)
    for layer in without.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name in [n for n, _ in part.named_children() if n.endswith("adapter")]:
                setattr(part, name, None)
    ours, theirs = (run_step(m, 1, fused=True, ragged=False) for m in (model, without))
    assert torch.equal(ours[0][:, : SHAPE.tokens], theirs[0][:, : SHAPE.tokens])
    assert torch.equal(ours[1], theirs[1])
    assert not torch.equal(ours[0], theirs[0])


def test_weights_stay_the_parameters_and_are_not_held_twice():
    model = make_model("qwen2")
    before = copy.deepcopy(model.state_dict())
    forward = DecodingForward(model, 8)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    attention = model.model.layers[0].self_attn
    weight = forward.layers[0].qkv.weight
    assert weight.data_ptr() == attention.q_proj.weight.data_ptr()
    again = DecodingForward(model, 8).layers[0].qkv.weight
    assert again.data_ptr() == weight.data_ptr(), "joined once"
    with torch.no_grad():
        attention.v_proj.weight[-1, -1] = 7.0  # what an optimizer writes in place is seen
    assert weight[-1, -1] == 7.0
    parts = [torch.nn.Parameter(torch.randn(n, 3)) for n in (2, 4)]
    expected = torch.cat([part.detach() for part in parts])
    assert torch.equal(joined(parts), expected)
    assert torch.equal(joined(parts), expected)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("heads", [(6, 2), (4, 1), (3, 3)])
def test_folded_groups_are_grouped_attention(batch, heads):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(batch, 5, heads[0], 8, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, batch, heads[1], 11, 8, generator=generator, dtype=torch.float64)
    mask = torch.rand(batch, 1, 5, 11, generator=generator) < 0.6
    mask[..., 0] = True
    expected = attend(query.transpose(1, 2), key, value, mask).transpose(1, 2).flatten(2)
    bias = fold_bias(as_bias(mask, torch.float64), batch, heads[1])
    got = attend_folded(query, key, value, bias, None)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.long
def test_compiled_kernels_are_the_functions_they_are_made_of():
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    for length in (1, 5, 9):
        qkv, table = torch.randn(1, length, 8, 16, generator=generator), None
        table = torch.randn(1, length, 8, 2, 16, generator=generator)
        kept = [torch.zeros(2, 1, 2, 32, 16) for _ in range(2)]
        places = torch.zeros(1, 1, dtype=torch.int64), torch.arange(length)[None] + 3
        got = inference.rotate_and_write.compiled(qkv, table, kept[0], *places, 4)
        expected = inference._rotate_and_write(qkv, table, kept[1], *places, 4)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(*kept)
        x = torch.randn(1, length, 32, generator=generator)
        torch.testing.assert_close(inference.swiglu.compiled(x), inference._swiglu(x))
    assert not any(kernel._failed for kernel in (inference.rotate_and_write, inference.swiglu))


class Kernels(TorchDispatchMode):
    """Counts the operators that compute something; what is one kernel on a GPU counts as one."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.inside = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not self.inside and name not in VIEWS:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))

    def one(self, function):
        def counted(*arguments):
            outermost, self.inside = not self.inside, True
            self.names[function.__name__] += outermost
            try:
                return function(*arguments)
            finally:
                self.inside = not outermost

        return counted


def test_a_layer_of_a_step_is_ten_kernels(monkeypatch):
    """What does not depend on the number of layers is counted by the tests of the engine."""
    counts = []
    for layers in (2, 3):
        model = make_model("qwen2", num_layers=layers)
        counter = Kernels()
        for name in ("_rotate_and_write", "_swiglu"):
            kernel = counter.one(getattr(inference, name))
            monkeypatch.setattr(inference, name[1:], kernel)
        cache = KVCache(model.config, 48, dtype=torch.float32, device=CPU, ragged=True)
        rule, forward = StepRule(SHAPE, 48, CPU, torch.float32), model.for_decoding(48)
        queries = step_inputs(1)[1]
        with torch.inference_mode(), counter:
            bias, where = cache.bias(rule), cache.positions(rule.offsets)
            forward.hidden(queries, where, bias, cache, SHAPE.tokens)
        counts.append(counter.names.total())
        monkeypatch.undo()
    assert counts[1] - counts[0] == 10
