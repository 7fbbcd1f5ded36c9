"""Small random models, their tokenizers, and folders that hold them."""

import json
from functools import cache
from pathlib import Path

import tokenizers
import torch
from safetensors.torch import save_file

from data_prep.tokenizers.load import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from data_prep.tokenizers.train import train_sentencepiece
from pipeline.checkpoint.files import write_file_list
from pipeline.model.config import ModelConfig
from pipeline.model.transformer import Transformer

SWITCHES = {
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "llama": {},
}
TEXT = [
    "def add(left, right):\n    return left + right\n\nclass Sum:\n    total = 0\n" * 3,
    "The rain in Spain stays mainly in the plain, and the train stays late again. " * 3,
    "x = [1, 2, 3]; y = {'key': x}; print(f'{x!r} {y!r}')  # comment\n" * 3,
    "for number in range(10):\n    if number % 2 == 0:\n        print(number, 'is even')\n" * 3,
    "We hold these truths to be self-evident; whatever holds, however, holds on evidence. " * 3,
]


def small_config(family: str = "qwen3", **changes) -> ModelConfig:
    values = {
        "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4,
        "num_kv_heads": 2, "head_dim": 8, "vocab_size": 330, "max_positions": 256,
        "rope_theta": 5000.0, "tie_embeddings": True, "mask_token_id": 4, "block_size": 3,
    }  # fmt: skip
    return ModelConfig(**{**values, **SWITCHES[family], **changes})


def random_model(config: ModelConfig, seed: int = 0) -> Transformer:
    """Every weight random, norms and biases too, so that a mix-up of two tensors shows."""
    model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
            if "norm" in name:
                parameter.add_(1.0)
    return model.eval()


@cache
def sentencepiece_tokenizer(model_type: str = "unigram") -> SentencePieceTokenizer:
    return train_sentencepiece(TEXT, 330, model_type, 100_000, 0)


@cache
def huggingface_tokenizer() -> HuggingFaceTokenizer:
    """Byte-level BPE as in the Qwen family, 300 ids with its end token; the mask comes on top."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(TEXT, trainer)
    return HuggingFaceTokenizer(model.to_str().encode(), "test")


def write_checkpoint(
    folder: Path, model: Transformer, tokenizer: Tokenizer, precision: str = "fp32"
) -> Path:
    """A checkpoint as training without ZeRO leaves it (real ones are in test_loading)."""
    folder.mkdir(parents=True)
    torch.save({"module": model.state_dict()}, folder / "mp_rank_00_model_states.pt")
    model.config.save(folder / "model.json")
    state = {"step": 7, "tokens": 1234, "identity": {"precision": precision}}
    (folder / "state.json").write_text(json.dumps(state))
    tokenizer.save(folder)
    write_file_list(folder)
    return folder


def write_run(run_dir: Path, model: Transformer, tokenizer: Tokenizer) -> Path:
    """A run directory with one checkpoint."""
    write_checkpoint(run_dir / "checkpoints" / "step-00000007", model, tokenizer)
    (run_dir / "checkpoints" / "latest").write_text("step-00000007\n")
    return run_dir


def write_huggingface(folder: Path, family: str, tokenizer: Tokenizer | None = None, **changes):
    """A folder saved by transformers itself from its own random model; returns that model."""
    import transformers

    name = family.capitalize()
    values = {
        "vocab_size": 330, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 256, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**{**values, **changes})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
            if "norm" in name:
                parameter.add_(1.0)
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save(folder)
    return model


def edit_json(path: Path, **changes) -> None:
    """Set keys of a JSON file; None deletes one."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def edit_weights(path: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors of a safetensors file; None deletes one."""
    from safetensors.torch import load_file

    tensors = {**load_file(path), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, path, metadata={"format": "pt"})
