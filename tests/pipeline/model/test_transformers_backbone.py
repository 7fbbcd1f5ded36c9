"""transformers' own decoders under our mask, positions and cache."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from small_models import huggingface_tokenizer

from data_prep.layout import build_layout
from pipeline.decoding import DecodeOptions, generate, generate_batch
from pipeline.decoding.cache import KVCache
from pipeline.model.attention import section_masks, training_mask
from pipeline.model.config import ModelConfig
from pipeline.model.hf_export import write_export
from pipeline.model.loading import initialize_from, load_into, load_model, open_model, read_model
from pipeline.model.mask import Spans, dense_mask, layout_spans
from pipeline.model.transformers_backbone import empty_model
from tidar_common.errors import UserError

SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
ABSENT = "absent"
FAMILIES = {
    "Gemma2": {"sliding_window": 96, "attn_logit_softcapping": None,
               "final_logit_softcapping": None},
    "Gemma3Text": {"sliding_window": 96, "query_pre_attn_scalar": 20},
    "Olmo2": {},
    "Phi3": {"sliding_window": None},
    "Mistral": {"sliding_window": 64},
    "Granite": {"attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 3.0,
                "embedding_multiplier": 2.0},
    "SmolLM3": {"no_rope_layer_interval": 2, "use_sliding_window": False},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "GPTNeoX": {"num_key_value_heads": ABSENT, "head_dim": ABSENT, "tie_word_embeddings": False},
}  # fmt: skip
LENGTHS = [9, 14]
FIRSTS = [0, 9]
"""Of two documents of a sequence: tokens, and where they begin."""


def write_family(folder, name: str, **changes):
    """A folder saved by transformers of a random model of the family; returns that model."""
    values = {**SIZES, **FAMILIES.get(name, {}), **changes}
    values = {key: value for key, value in values.items() if value != ABSENT}
    config = getattr(transformers, f"{name}Config")(**values)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.empty_like(parameter).normal_(0.0, 0.2, generator=generator))
    model.save_pretrained(folder)
    huggingface_tokenizer().save(folder)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return folder, write_family(folder, request.param)


def drafting(folder, **changes) -> ModelConfig:
    """The folder's shape with a mask token, in a row that is added."""
    source = open_model(folder, backbone="transformers").config
    return replace(source, vocab_size=301, mask_token_id=300, block_size=3, **changes)


def start(folder, **changes):
    config = drafting(folder, **changes)
    model = empty_model(config, torch.device("cpu"), torch.float32)
    load_into(model, open_model(folder, backbone="transformers"))
    return model.eval()


def ids_of(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 300, (2, length), generator=torch.Generator().manual_seed(seed))


def joint_inputs(num_slots: int):
    """Two packed sequences of two documents: ids, positions and both forms of the rule."""
    layout = build_layout(LENGTHS, 3)
    total = sum(LENGTHS)
    spans = torch.from_numpy(layout_spans(LENGTHS, layout, num_slots))
    rule = Spans(*(part.expand(2, -1).clone() for part in spans))
    ids = torch.cat([ids_of(total), torch.full((2, num_slots), 300)], dim=1)
    clean = np.concatenate([np.arange(length) for length in LENGTHS])
    starts = np.concatenate([np.full(length, s) for length, s in zip(LENGTHS, FIRSTS, strict=True)])
    slots = np.concatenate(
        [np.arange(a, b) for a, b in zip(layout.prefix_end, layout.draft_end, strict=True)]
    )
    where = torch.from_numpy(np.concatenate([clean, slots - starts[slots]]))
    return ids, where, rule, dense_mask(LENGTHS, layout), total


def test_causal_logits_are_transformers_own(family):
    folder, theirs = family
    model = read_model(open_model(folder, backbone="transformers"), device="cpu")
    ids = ids_of(40)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
    assert model.config.num_parameters == sum(p.numel() for p in theirs.parameters())


def test_the_joint_forward_follows_the_rule(family):
    """Every backend, and the sections one after the other, equal transformers' own eager code
    under the dense mask."""
    folder, theirs = family
    model = start(folder)
    ids, where, rule, dense, clean = joint_inputs(sum(LENGTHS))
    theirs.set_attn_implementation("eager")
    weight = model.model.embed_tokens.weight.detach()
    bias = torch.zeros(2, 1, *dense.shape).masked_fill(~dense, torch.finfo(torch.float32).min)
    kinds = set(getattr(theirs.config, "layer_types", None) or ())
    mapped = (
        dict.fromkeys(kinds, bias) if len(kinds) > 1 or "gemma" in model.config.family else bias
    )
    with torch.no_grad():
        scale = getattr(model.model.embed_tokens, "scalar_embed_scale", 1.0)
        base = getattr(theirs, theirs.base_model_prefix)
        embedded = torch.nn.functional.embedding(ids, weight) * scale
        positions = where.expand(2, -1)
        expected = base(inputs_embeds=embedded, attention_mask=mapped, position_ids=positions)
        expected = expected.last_hidden_state / model.model.logits_scaling
        for backend in ("dense", "tiles", "flex"):
            mask = training_mask(rule, torch.device("cpu"), backend)
            hidden = model.hidden(ids, positions, mask, clean=clean)
            torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=2e-4)
        masks = section_masks(rule, torch.device("cpu"))
        hidden = model.hidden(ids, positions, masks, clean=clean)
        torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=2e-4)


def test_a_cache_changes_nothing(family):
    folder, _ = family
    model = read_model(open_model(folder, backbone="transformers"), device="cpu")
    ids = ids_of(12)[:1]
    cache = KVCache(model.config, 16, dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        expected = model(ids)
        first = model.hidden(ids[:, :7], torch.arange(7), cache=cache)
        cache.keep(7)
        then = model.hidden(ids[:, 7:], torch.arange(7, 12), cache=cache)
        logits = model.lm_head(torch.cat([first, then], dim=1))
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_greedy_tidar_is_greedy_ar(family):
    folder, _ = family
    model = start(folder, draft_rank=2)
    prompt = ids_of(10)[0].tolist()
    ar = generate(model, prompt, method="ar", max_new_tokens=16)
    tidar = generate(model, prompt, method="tidar", max_new_tokens=16)
    assert tidar.tokens == ar.tokens
    assert len(ar.tokens) == 16


def test_the_export_is_the_folder_bit_for_bit(family, tmp_path):
    folder, _ = family
    _, tokenizer = load_model(folder, device="cpu")
    model = read_model(open_model(folder, backbone="transformers"), device="cpu")
    output = tmp_path / "export"
    write_export(model, tokenizer, open_model(folder), output)
    before, after = load_file(folder / "model.safetensors"), load_file(output / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    saved, written = (json.loads((f / "config.json").read_text()) for f in (folder, output))
    assert written["architectures"] == saved["architectures"]
    again = transformers.AutoModelForCausalLM.from_pretrained(output).eval()
    with torch.no_grad():
        assert torch.equal(again(ids_of(9)).logits, theirs_logits(folder, ids_of(9)))


def theirs_logits(folder, ids):
    with torch.no_grad():
        return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits


def test_an_export_keeps_what_drafts(tmp_path):
    base, output = tmp_path / "base", tmp_path / "export"
    write_family(base, "Granite")
    model = start(
        base, adapter_rank=2, adapter_targets=("q_proj",), own_mask_embedding=True, draft_rank=2
    )
    write_export(model, huggingface_tokenizer(), open_model(base), output)
    again, _ = load_model(output, device="cpu")
    assert again.config == replace(model.config, hosted=again.config.hosted)
    mine, theirs = model.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(theirs[name], tensor), name


def test_rows_of_a_batch_are_what_each_is_alone(tmp_path):
    write_family(tmp_path, "SmolLM3")
    model = start(tmp_path, draft_rank=2)
    prompts = [ids_of(length)[0].tolist() for length in (5, 11)]
    options = DecodeOptions.of(method="tidar", max_new_tokens=12)
    together = generate_batch(model, prompts, options)
    for prompt, row in zip(prompts, together, strict=True):
        alone = generate(model, prompt, method="ar", max_new_tokens=12)
        assert row.tokens == alone.tokens


@pytest.mark.parametrize("how", ["none", "full"])
@pytest.mark.parametrize("name", ["Olmo2", "Qwen3Moe"])
def test_a_frozen_base_learns_to_draft_and_stays(tmp_path, name, how):
    """Adapters act on slots alone; gradients reach them, with recomputation too."""
    write_family(tmp_path, name)
    targets = ("q_proj", "v_proj", "o_proj")
    model = start(
        tmp_path, adapter_rank=2, adapter_targets=targets, own_mask_embedding=True, draft_rank=2
    )
    ids, where, rule, _, clean = joint_inputs(sum(LENGTHS))
    plain = start(tmp_path)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "_adapter.up" in key:
                parameter.normal_(0.0, 0.3, generator=generator)
        mask = training_mask(rule, torch.device("cpu"))
        with_adapters = model.hidden(ids, where.expand(2, -1), mask, clean=clean)
        without = plain.hidden(ids, where.expand(2, -1), mask, clean=clean)
        torch.testing.assert_close(with_adapters[:, :clean], without[:, :clean])
        assert not torch.allclose(with_adapters[:, clean:], without[:, clean:])
    model.freeze_base().checkpoint_activations(how).train()
    masks = section_masks(rule, torch.device("cpu"))
    hidden = model.hidden(ids, where.expand(2, -1), masks, clean=clean)
    torch.testing.assert_close(hidden.detach(), with_adapters, rtol=1e-4, atol=1e-4)
    hidden.square().mean().backward()
    for key, parameter in model.named_parameters():
        learns = "_adapter" in key or key == "model.mask_embedding"
        assert (parameter.grad is not None and bool(parameter.grad.any())) == learns, key


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("Gemma2", {}, "attn_logit_softcapping is 50"),
        ("Olmo2", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
         "rope_type is dynamic"),
        ("GPT2", {"n_embd": 32, "n_layer": 1, "n_head": 2}, "model_type 'gpt2' is not one of"),
    ],
)  # fmt: skip
def test_what_cannot_be_hosted_is_refused(tmp_path, name, changes, says):
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **changes})
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=says) as caught:
        open_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_window_bounds_the_positions(tmp_path):
    write_family(tmp_path, "Mistral")
    assert open_model(tmp_path).config.max_positions == 64
    assert open_model(tmp_path).config.hosted is not None
    assert "up to 64 positions, within which its sliding" in str(open_model(tmp_path))
    longer = replace(drafting(tmp_path), max_positions=65)
    with pytest.raises(UserError, match="has max_positions 64, the config has 65"):
        initialize_from(tmp_path, longer)
    write_family(tmp_path, "Mistral", sliding_window=None)
    assert open_model(tmp_path).config.hosted is None
    with pytest.raises(UserError, match=r"model\.backbone: 'other' is not one of"):
        open_model(tmp_path, backbone="other")


def test_adapters_need_projections_that_are_there(tmp_path):
    write_family(tmp_path, "Phi3")
    with pytest.raises(
        UserError, match=r"phi3 has no projection q_proj; set .*=\[down_proj,o_proj"
    ):
        start(tmp_path, adapter_rank=2, adapter_targets=("q_proj",))
    other = replace(drafting(tmp_path), hidden_size=64)
    with pytest.raises(UserError, match=r"init_from: .* has hidden_size 32"):
        initialize_from(tmp_path, other)
