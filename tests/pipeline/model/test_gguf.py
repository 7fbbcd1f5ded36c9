"""GGUF files: the shape, the weights but for what quantising took, the tokenizer."""

import copy
import json
import os

import numpy as np
import pytest
import torch
from small_models import huggingface_tokenizer, write_huggingface

from data_prep.tokenizers.load import load_tokenizer
from pipeline import load_model
from pipeline.model.loading import open_model
from tidar_common.errors import UserError

gguf = pytest.importorskip("gguf")

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "model.layers": "blk",
}  # fmt: skip


def gguf_name(name: str) -> str:
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def write_gguf(path, model, kind, extra=()) -> None:
    """`model`, a Qwen2, as llama.cpp's converter writes it: matrices in `kind`, the rest in F32."""
    config = model.config
    pieces = json.loads(huggingface_tokenizer().content())
    vocabulary = sorted(huggingface_tokenizer().vocabulary().items(), key=lambda item: item[1])
    names = [name for name, _ in vocabulary][: config.vocab_size]
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(names)
    writer.add_token_types([1] * len(names))
    writer.add_token_merges([" ".join(pair) for pair in pieces["model"]["merges"]])
    writer.add_eos_token_id(huggingface_tokenizer().eos_id)
    for name, tensor in [*model.state_dict().items(), *extra]:
        values = tensor.float().numpy()
        raw = kind if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(gguf_name(name), gguf.quantize(values, raw), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    rows = len(huggingface_tokenizer().vocabulary())
    folder = tmp_path_factory.mktemp("hf")
    return write_huggingface(folder, "qwen2", vocab_size=rows, intermediate_size=64)


@pytest.mark.parametrize(("kind", "bound"), [("F32", 2.0**-8), ("Q8_0", 0.012)])
def test_weights_are_dequantised(theirs, tmp_path, kind, bound):
    file = tmp_path / "model.gguf"
    write_gguf(file, theirs, gguf.GGMLQuantizationType[kind])
    model, tokenizer = load_model(file, device="cpu")
    assert model.config == open_model(file).config
    assert (model.config.num_heads, model.config.num_kv_heads) == (4, 2)
    assert (model.config.rope_theta, model.config.qkv_bias) == (5000.0, True)
    mine = model.state_dict()
    for name, tensor in theirs.state_dict().items():
        # bf16 keeps 8 bits; a block of Q8_0 has steps of its largest value / 127.
        error = (mine[name].float() - tensor).abs().max() / tensor.abs().max()
        assert error < bound, name
    text = "def add(left, right): return 3"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_id == huggingface_tokenizer().eos_id
    assert "dequantised" in str(open_model(file))


def test_what_the_reader_would_pass_over_is_refused(theirs, tmp_path):
    file = tmp_path / "model.gguf"
    factors = ("rope_freqs.weight", torch.ones(4))
    write_gguf(file, theirs, gguf.GGMLQuantizationType.F32, [factors])
    with pytest.raises(UserError, match=r"rope_freqs\.weight"):
        open_model(file)


def test_a_file_is_described_once_and_anew_when_it_changes(theirs, tmp_path, monkeypatch):
    file = tmp_path / "model.gguf"
    write_gguf(file, theirs, gguf.GGMLQuantizationType.F32)
    first, read = open_model(file).config, []
    monkeypatch.setattr("pipeline.model.gguf._load", lambda path: read.append(path))
    assert open_model(file).config == first
    assert not read
    monkeypatch.undo()
    longer = copy.deepcopy(theirs)
    longer.config.max_position_embeddings *= 2
    write_gguf(file, longer, gguf.GGMLQuantizationType.F32)
    os.utime(file, ns=(0, 0))
    assert open_model(file).config.max_positions == 2 * first.max_positions


def test_its_tokenizer_is_that_of_transformers(theirs, tmp_path):
    from transformers import AutoTokenizer

    write_gguf(tmp_path / "model.gguf", theirs, gguf.GGMLQuantizationType.F32)
    expected = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    mine = load_tokenizer(tmp_path / "model.gguf")
    for text in ("def add(left, right): return 3", "naïve café, 今日は 🙂\n\tx", ""):
        assert mine.encode(text) == expected.encode(text, add_special_tokens=False)
    assert mine.eos_id == expected.eos_token_id


def test_a_damaged_file_is_named_on_one_line(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(np.zeros(64, np.uint8).tobytes())
    with pytest.raises(UserError, match=r"model\.gguf: not a GGUF file") as caught:
        open_model(file)
    assert "\n" not in str(caught.value)
