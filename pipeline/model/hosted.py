"""Folders of models that transformers runs (`pipeline.model.transformers_backbone`): what of them
can be hosted, their weights in, and an export out.
"""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.model.config import ModelConfig
from pipeline.model.parameters import is_drafting
from pipeline.model.source import NamedWeight
from pipeline.model.transformers_backbone import library_config, library_names
from tidar_common.errors import UserError

HOSTED = (
    "gemma2", "gemma3_text", "gpt_neox", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2",
    "qwen3", "qwen3_moe", "smollm3",
)  # fmt: skip
"""Values of `model_type` whose logits and masks were compared with transformers' own."""
WINDOWS = ("sliding_window", "attention_chunk_size")
ROTARY = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary positions that do not depend on a text's length."""


def hosted_config(path: Path, values: dict[str, Any]) -> ModelConfig:
    """The shape in the content `values` of the `config.json` at `path`.

    Attention is over the whole text: a model with a sliding window is taken for as many positions
    as the window has, where both are the same.

    Raises:
        UserError: naming the field of what cannot be hosted.
    """
    import transformers

    family = values.get("model_type")
    if family not in HOSTED:
        raise UserError(f"{path}: model_type {family!r} is not one of {', '.join(HOSTED)}")
    try:
        theirs = transformers.CONFIG_MAPPING[family].from_dict(values)
    except Exception as error:  # a validation error of its own for every kind of mistake
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error
    _refuse_unsupported(path, theirs)
    heads = theirs.num_attention_heads
    positions = theirs.max_position_embeddings
    try:
        return ModelConfig(
            hidden_size=theirs.hidden_size,
            intermediate_size=theirs.intermediate_size,
            num_layers=theirs.num_hidden_layers,
            num_heads=heads,
            num_kv_heads=getattr(theirs, "num_key_value_heads", None) or heads,
            head_dim=getattr(theirs, "head_dim", None) or theirs.hidden_size // heads,
            vocab_size=theirs.vocab_size,
            max_positions=min(positions, window(theirs) or positions),
            tie_embeddings=bool(theirs.tie_word_embeddings),
            hosted=json.loads(theirs.to_json_string()) | {"model_type": family},
            hosted_elements=_layer_elements(theirs),
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: {error}") from error


def _layer_elements(theirs: Any) -> int:
    """Parameters of all but the embedding and the LM head."""
    import transformers

    with torch.device("meta"):
        base = transformers.AutoModel.from_config(theirs)
    embedding = base.get_input_embeddings().weight.numel()
    return sum(parameter.numel() for parameter in base.parameters()) - embedding


def window(theirs: Any) -> int | None:
    """Positions that the narrowest layer sees; None where all see everything."""
    kinds = getattr(theirs, "layer_types", None)
    if kinds is not None and not set(kinds) - {"full_attention"}:
        return None
    sizes = [size for name in WINDOWS if (size := getattr(theirs, name, None))]
    return min(sizes) if sizes and getattr(theirs, "use_sliding_window", True) else None


def remark(config: ModelConfig) -> str:
    """What to say of a window that bounds a hosted `config`; empty without one."""
    trained = (config.hosted or {}).get("max_position_embeddings", 0)
    if config.max_positions >= trained:
        return ""
    return f", within which its sliding window hides nothing (it was made for {trained:,})"


def _refuse_unsupported(path: Path, theirs: Any) -> None:
    rope = getattr(theirs, "rope_parameters", None) or {}
    nested = [part for part in rope.values() if isinstance(part, dict)] or [rope]
    kinds = {part.get("rope_type", "default") for part in nested} - set(ROTARY)
    refused = {
        "rope_parameters.rope_type": min(kinds) if kinds else None,
        "attn_logit_softcapping": getattr(theirs, "attn_logit_softcapping", None),
        "final_logit_softcapping": getattr(theirs, "final_logit_softcapping", None),
        "use_bidirectional_attention": getattr(theirs, "use_bidirectional_attention", None) or None,
        "quantization_config": getattr(theirs, "quantization_config", None) and "set",
    }
    for field, value in refused.items():
        if value is not None:
            raise UserError(
                f"{path}: {field} is {value}, which neither backbone implements; use a model "
                "without it"
            )


def read_hosted(folder: Path, config: ModelConfig, dtype: torch.dtype) -> Iterator[NamedWeight]:
    """The weights of the model in `folder`, read by transformers, which knows how each family's
    files are laid out; all stand in memory at once."""
    state = _read(folder, dtype)
    for theirs, ours in library_names(config, iter(state)).items():
        tensor = state[theirs]
        yield NamedWeight(ours, folder, tensor.shape, tensor.contiguous)


@cache
def _progress_off() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


def _read(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    import transformers

    _progress_off()
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, use_safetensors=True
        )
    except Exception as error:  # of many kinds
        raise UserError(f"{folder}: cannot be read ({' '.join(str(error).split())})") from error
    model, report = loaded
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(what):
            first = min(map(str, report[what]))
            raise UserError(f"{folder}: {what.replace('_', ' ')}, {first}; the model is incomplete")
    return dict(model.state_dict())


def save_hosted(model: torch.nn.Module, config: ModelConfig, folder: Path, shard: int) -> None:
    """Write `config.json` and the weights of a hosted `model` as transformers does, without what
    only drafts."""
    import transformers

    _progress_off()
    theirs = library_config(config)
    for name, value in (config.hosted or {}).items():
        if "dropout" in name:
            setattr(theirs, name, value)
    theirs.use_cache = True
    state = {name: tensor for name, tensor in model.state_dict().items() if not is_drafting(name)}
    with torch.device("meta"):
        whole = transformers.AutoModelForCausalLM.from_config(theirs)
    names = library_names(config, iter(whole.state_dict()))
    dtype = next(iter(state.values())).dtype
    whole.to(dtype)
    whole.config.dtype = dtype
    whole.load_state_dict({a: state[b] for a, b in names.items()}, strict=False, assign=True)
    whole.tie_weights()
    whole.save_pretrained(folder, max_shard_size=shard)
