"""Folders of Hugging Face models: the same logits as transformers, or a clear refusal."""

import json

import pytest
import tokenizers
import torch
from small_models import (
    edit_json,
    edit_weights,
    huggingface_tokenizer,
    write_huggingface,
)

from pipeline import load_model
from pipeline.model.huggingface import config_from_huggingface, config_to_huggingface
from pipeline.model.loading import open_model
from tidar_common.errors import UserError

FAMILIES = ("qwen2", "qwen3", "llama")


@pytest.fixture
def folder(tmp_path):
    """A Qwen3 folder to damage."""
    write_huggingface(tmp_path, "qwen3", huggingface_tokenizer())
    return tmp_path


def refusal(folder) -> str:
    with pytest.raises(UserError) as error:
        load_model(folder, device="cpu")
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(tmp_path, family, tied):
    theirs = write_huggingface(tmp_path, family, huggingface_tokenizer(), tie_word_embeddings=tied)
    ours, tokenizer = load_model(tmp_path, dtype="fp32", device="cpu")
    assert ours.config.family == family
    assert ours.config.tie_embeddings == tied
    assert not ours.training
    assert ours.config.mask_token_id is None
    assert tokenizer.content() == huggingface_tokenizer().content()
    ids = torch.randint(330, (2, 200), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = theirs(ids).logits
        # Rows behind the tokenizer's are no text, and say so.
        text = tokenizer.vocab_size
        difference = (ours(ids) - expected)[..., :text].abs().max()
        # Far-away positions too: rotary angles agree for any offset that a sequence may have.
        place = torch.arange(200) + 50
        shifted = theirs(ids, position_ids=place[None]).logits
        other = ids.clone()
        other[:, :20] = 0
        reach = (theirs(other).logits[:, -1] - expected[:, -1]).abs().max()
        shifted_difference = (ours(ids, place) - shifted)[..., :text].abs().max()
    assert float(difference) < 1e-4
    assert float(shifted_difference) < 1e-4
    assert float(reach) > 1e-2, "the first tokens matter to the last, so rotation is tested"


def test_sharded_folders_and_types(tmp_path):
    theirs = write_huggingface(tmp_path / "one", "qwen2", huggingface_tokenizer())
    theirs.bfloat16().save_pretrained(tmp_path / "many", max_shard_size="20KB")
    huggingface_tokenizer().save(tmp_path / "many")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    model, _ = load_model(tmp_path / "many", device="cpu")
    state = theirs.state_dict()
    assert model.state_dict().keys() == state.keys()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, state[name])
    upcast, _ = load_model(tmp_path / "many", dtype=torch.float32, device=torch.device("cpu"))
    assert torch.equal(upcast.lm_head.weight, state["lm_head.weight"].float())


def test_rope_as_older_releases_wrote_it(folder):
    edit_json(folder / "config.json", rope_parameters=None, rope_theta=7000.0, rope_scaling=None)
    assert config_from_huggingface(folder / "config.json").rope_theta == 7000.0


SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn, all given": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
        "attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", "llama3"), ("qwen2", "yarn"), ("qwen3", "yarn, all given"), ("llama", "linear")],
)
def test_stretched_positions_equal_transformers_both_ways(tmp_path, family, kind):
    scaling = {**SCALINGS[kind], "rope_theta": 500.0}
    theirs = write_huggingface(
        tmp_path / "in", family, huggingface_tokenizer(), rope_parameters=scaling
    )
    ours, tokenizer = load_model(tmp_path / "in", dtype="fp32", device="cpu")
    text = tokenizer.vocab_size
    ids = torch.randint(330, (1, 200), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = theirs(ids).logits
        assert float((ours(ids) - expected)[..., :text].abs().max()) < 1e-4
        ours.model.rope_scaling = None
        assert float((ours(ids) - expected)[..., :text].abs().max()) > 1e-2, "the stretching shows"
    again = config_to_huggingface(ours.config, torch.float32)
    (tmp_path / "config.json").write_text(json.dumps(again))
    assert config_from_huggingface(tmp_path / "config.json") == ours.config


def test_a_sliding_window_that_is_switched_off_is_no_obstacle(folder):
    edit_json(folder / "config.json", sliding_window=64, use_sliding_window=False)
    load_model(folder, device="cpu")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model_type": "gpt2"}, "model_type"),
        (
            {"rope_parameters": None, "rope_theta": 1e4,
             "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_scaling.rope_type",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4,
                                 "original_max_position_embeddings": 64, "mscale": 0.7}},
            "rope_scaling.mscale",
        ),
        (
            {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1,
             "layer_types": None},
            "sliding_window",
        ),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"num_key_value_heads": 3}, "num_kv_heads"),
        ({"hidden_size": "wide"}, "hidden_size"),
    ],
)  # fmt: skip
def test_configs_it_cannot_represent_are_refused(folder, changes, field):
    edit_json(folder / "config.json", **changes)
    with pytest.raises(UserError) as caught:
        open_model(folder, backbone="compact")
    message = str(caught.value)
    assert "config.json" in message
    assert field in message


def test_mlp_bias_is_refused(tmp_path):
    write_huggingface(tmp_path, "llama", huggingface_tokenizer(), mlp_bias=True)
    with pytest.raises(UserError, match="mlp_bias"):
        open_model(tmp_path, backbone="compact")
    assert open_model(tmp_path).config.hosted is not None  # transformers runs it


def test_missing_unknown_and_misshapen_tensors_are_named(folder):
    weights = folder / "model.safetensors"
    original = weights.read_bytes()
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(weights, **{name: None})
    assert name in refusal(folder)
    weights.write_bytes(original)
    edit_weights(weights, **{name: torch.zeros(48, 31)})
    message = refusal(folder)
    assert name in message
    assert "[48, 31]" in message
    assert str(weights) in message
    weights.write_bytes(original)
    edit_weights(weights, **{"model.embed_tokens.weight": torch.zeros(329, 32)})
    assert "[329, 32]" in refusal(folder)
    weights.write_bytes(original)
    edit_weights(weights, **{"model.layers.2.mlp.up_proj.weight": torch.zeros(48, 32)})
    assert "model.layers.2.mlp.up_proj.weight" in refusal(folder)


def test_damaged_files_are_named(folder):
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-100])
    assert str(weights) in refusal(folder)
    weights.unlink()
    assert "safetensors" in refusal(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "gone.safetensors"}}))
    assert "gone.safetensors" in refusal(folder)
    index.write_text("{")
    assert str(index) in refusal(folder)


def test_a_tied_head_may_be_repeated_but_not_contradicted(tmp_path):
    write_huggingface(tmp_path, "llama", huggingface_tokenizer(), tie_word_embeddings=True)
    weights = tmp_path / "model.safetensors"
    model, _ = load_model(tmp_path, device="cpu")
    repeated = model.model.embed_tokens.weight.detach().clone()
    edit_weights(weights, **{"lm_head.weight": repeated})
    again, _ = load_model(tmp_path, device="cpu")
    assert torch.equal(again.lm_head.weight, repeated)
    edit_weights(weights, **{"lm_head.weight": repeated + 1})
    assert "lm_head.weight" in refusal(tmp_path)


def test_old_rotary_buffers_are_passed_over(folder):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(folder / "model.safetensors", **{name: torch.zeros(4)})
    load_model(folder, device="cpu")


def test_the_end_token_is_the_one_the_folder_names(folder):
    path = folder / "tokenizer.json"
    model = tokenizers.Tokenizer.from_file(str(path))
    model.add_special_tokens(["<|stop|>"])
    model.save(str(path))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|stop|>"}))
    _, tokenizer = load_model(folder, device="cpu")
    assert tokenizer.eos_id == model.token_to_id("<|stop|>")
