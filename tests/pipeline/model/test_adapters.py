"""Low-rank updates on mask slots alone, and the joint forward of a frozen base."""

from dataclasses import replace

import pytest
import torch
from small_models import random_model, small_config

from bench.inputs import random_batch
from pipeline.decoding.cache import KVCache
from pipeline.model.attention import section_masks, training_mask
from pipeline.model.config import ADAPTER_TARGETS, CHECKPOINTING, ModelConfig
from pipeline.model.parameters import is_drafting
from pipeline.model.transformer import Transformer

CPU = torch.device("cpu")
MASK = 329


def drafting_config(**changes) -> ModelConfig:
    values = {"mask_token_id": MASK, "adapter_rank": 3, "adapter_targets": ADAPTER_TARGETS,
              "own_mask_embedding": True}  # fmt: skip
    return small_config(**{**values, **changes})


def base_of(model: Transformer) -> Transformer:
    """The model without anything that only drafts."""
    plain = Transformer(replace(model.config, adapter_rank=0, own_mask_embedding=False))
    plain.load_state_dict({n: w for n, w in model.state_dict().items() if not is_drafting(n)})
    return plain.to(next(model.parameters()).dtype).eval()


def batch_of(config: ModelConfig, coverage: float = 1.0):
    return random_batch(config, 2, 96, 40, coverage)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("targets", [ADAPTER_TARGETS, ("k_proj",), ("o_proj", "up_proj")])
@torch.no_grad()
def test_slots_are_the_merged_model_over_the_clean_models_cache(family, targets):
    model = random_model(drafting_config(family=family, adapter_targets=targets)).double()
    base, merged = base_of(model), base_of(model)
    for layer, own in zip(merged.model.layers, model.model.layers, strict=True):
        for part, source in ((layer.self_attn, own.self_attn), (layer.mlp, own.mlp)):
            for name in targets:
                adapter = getattr(source, name.replace("proj", "adapter"), None)
                if adapter is not None:
                    getattr(part, name).weight += adapter.up.weight @ adapter.down.weight
    merged.model.embed_tokens.weight[MASK] = model.model.mask_embedding
    batch = batch_of(model.config, 0.5)
    ids, where, clean = batch.input_ids, batch.position_ids, batch.spans.clean_tokens
    hidden = model.hidden(ids, where, training_mask(batch.spans, CPU), clean=clean)
    dense = training_mask(batch.spans, CPU, "dense")
    kept = KVCache(base.config, ids.shape[1], dtype=torch.float64, device=CPU, batch_size=2)
    text = base.hidden(ids[:, :clean], where[:, :clean], dense[:, :, :clean, :clean], kept)
    kept.keep(clean)
    slots = merged.hidden(ids[:, clean:], where[:, clean:], dense[:, :, clean:], kept)
    torch.testing.assert_close(hidden, torch.cat([text, slots], 1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_clean_rows_are_those_of_the_base_bit_for_bit(dtype):
    model = random_model(drafting_config()).to(dtype)
    base, batch = base_of(model), batch_of(model.config)
    clean, mask = batch.spans.clean_tokens, training_mask(batch.spans, CPU)
    ours, theirs = (
        m.hidden(batch.input_ids, batch.position_ids, mask, clean=clean) for m in (model, base)
    )
    assert torch.equal(ours[:, :clean], theirs[:, :clean])
    assert not torch.isclose(ours[:, clean:], theirs[:, clean:], rtol=0.1).all()
    # Without slots there is nothing to adapt, and a mask token in text is a token.
    ids = torch.tensor([[5, MASK, 7]])
    assert torch.equal(model(ids), base(ids))


@pytest.mark.parametrize("backend", ["tiles", "flex", "dense", "auto"])
@pytest.mark.parametrize(("coverage", "causal"), [(1.0, False), (0.3, False), (1.0, True)])
def test_a_frozen_base_is_the_joint_forward_with_gradients(backend, coverage, causal, monkeypatch):
    # FlexAttention refuses gradients on a CPU, although its reference computes them.
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    config = drafting_config(num_kv_heads=1 if backend == "dense" else 2)
    batch = batch_of(config, coverage)
    batch = replace(batch, spans=replace(batch.spans, causal_slots=causal))
    clean = batch.spans.clean_tokens
    weights = torch.randn(2, batch.input_ids.shape[1], 32, dtype=torch.float64)
    weights[:, :clean] = 0

    def run(mask, frozen: bool, checkpointing: str = "none"):
        model = random_model(config).double().train().checkpoint_activations(checkpointing)
        if frozen:
            model.freeze_base()
        hidden = model.hidden(batch.input_ids, batch.position_ids, mask, clean=clean)
        (hidden * weights).sum().backward()
        return hidden.detach(), {n: p.grad for n, p in model.named_parameters()}

    expected, gradients = run(training_mask(batch.spans, CPU, "dense"), False)
    for how in CHECKPOINTING if backend == "tiles" else ("none",):
        hidden, found = run(section_masks(batch.spans, CPU, backend), True, how)
        torch.testing.assert_close(hidden, expected, rtol=1e-9, atol=1e-9)
        for name, own in found.items():
            if is_drafting(name):
                torch.testing.assert_close(own, gradients[name], rtol=1e-8, atol=1e-9, msg=name)
            else:
                assert own is None, name


def test_no_graph_is_kept_for_the_clean_section():
    """Saved for the backward pass: what a mask section of a quarter takes, not four times that."""
    config = drafting_config()
    saved = {}
    for frozen in (False, True):
        batch = batch_of(config, 0.25)
        model = random_model(config).train()
        mask = training_mask(batch.spans, CPU)
        if frozen:
            model.freeze_base()
            mask = section_masks(batch.spans, CPU)
        sizes = {}

        def pack(x, sizes=sizes):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            kept = model.hidden(batch.input_ids, batch.position_ids, mask, clean=96)
        saved[frozen] = sum(size for at, size in sizes.items() if at not in weights)
        del kept
    assert saved[True] < 0.5 * saved[False]


def test_adapters_change_no_other_draw():
    plain = Transformer(small_config(mask_token_id=MASK)).initialize(3).state_dict()
    model = Transformer(drafting_config()).initialize(3)
    fewer = Transformer(drafting_config(adapter_targets=("o_proj",))).initialize(3).state_dict()
    for name, weight in model.state_dict().items():
        if name in plain:
            assert torch.equal(weight, plain[name]), name
        elif name.endswith("up.weight"):
            assert not weight.any()
        else:
            assert weight.any()
            assert name not in fewer or torch.equal(weight, fewer[name]), name
    ids, where = torch.randint(0, 300, (1, 20)), torch.arange(20)
    adapted = model.hidden(ids, where, None, clean=8)
    assert torch.equal(adapted, base_of(model).hidden(ids, where, None))
    assert model.config.num_parameters == sum(p.numel() for p in model.parameters())
    learning = sum(p.numel() for p in model.freeze_base().parameters() if p.requires_grad)
    assert model.config.num_drafting_parameters == learning


def test_shapes_that_are_none_are_refused():
    with pytest.raises(ValueError, match="no projection 'head'; known are q_proj, k_proj"):
        drafting_config(adapter_targets=("head",))
    with pytest.raises(ValueError, match="names no projection"):
        drafting_config(adapter_targets=())
    assert drafting_config(adapter_targets=["up_proj", "q_proj"]).adapter_targets == (
        "q_proj",
        "up_proj",
    )
