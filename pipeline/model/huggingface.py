"""Hugging Face folders as a source of weights, and the two configs translated into each other.

Parameter names need no translation: the modules of `transformer.py` are named like those of
`Qwen2ForCausalLM`, `Qwen3ForCausalLM` and `LlamaForCausalLM`.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_prep.tokenizers.load import (
    HUGGINGFACE_FILE,
    SENTENCEPIECE_FILE,
    Tokenizer,
    load_tokenizer,
)
from pipeline.model.config import DRAFTING_FIELDS, ModelConfig
from pipeline.model.draft_record import DraftRecord
from pipeline.model.hosted import hosted_config, read_hosted, remark
from pipeline.model.source import EMBEDDING, NamedWeight, SavedModel
from tidar_common.errors import UserError
from tidar_common.files import read_text_checked

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
TIDAR_FILE = "tidar.json"
DRAFTING_WEIGHTS_FILE = "tidar.safetensors"
"""Weights that only draft, apart from the base model's, which other software loads."""
FORMAT_VERSION = 2
"""Of `tidar.json`. Version 1 had no `drafting`, and no weights that only draft."""
ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
}
FAMILIES = {**ARCHITECTURES, "mistral": "MistralForCausalLM"}
"""Those read: Mistral without a sliding window is Llama, and exported as such."""
DEFAULT_ROPE_THETA = 10000.0
BACKBONES = ("auto", "compact", "transformers")
"""What runs a model's layers: ours, or transformers' own code (`transformers_backbone`)."""
EMBEDDINGS = (EMBEDDING, "gpt_neox.embed_in.weight")
"""Names of the embedding on disk."""
ROTARY_BUFFER = "rotary_emb.inv_freq"
"""Old Llama files hold this table, which follows from the config."""


def open_folder(folder: Path, backbone: str = "auto") -> SavedModel:
    """The Hugging Face folder, with what `tidar.json` adds to it where there is one, for one of
    `BACKBONES`.

    Raises:
        UserError: naming the file, and the field of its config, that this model cannot represent.
    """
    tidar = read_tidar(folder)
    config = with_drafting(folder, folder_config(folder / CONFIG_FILE, backbone), tidar)
    files, drafting = weight_files(folder), []
    if config.num_drafting_parameters:
        drafting.append(folder / DRAFTING_WEIGHTS_FILE)
        if not drafting[-1].is_file():
            raise UserError(f"{drafting[-1]}: missing, although {TIDAR_FILE} asks for it")
    dtype = stored_dtype(files)

    def weights(wanted: torch.dtype) -> Iterator[NamedWeight]:
        if config.hosted is None:
            yield from _read(files + drafting)
        else:
            yield from read_hosted(folder, config, dtype)
            yield from _read(drafting)

    return SavedModel(
        folder=folder,
        config=config,
        dtype=dtype,
        weights=weights,
        tokenizer=lambda: _tokenizer(folder, tidar),
        progress=tidar.get("training") if tidar else None,
        remark=remark(config),
        draft_record=read_record(folder, tidar),
    )


def with_drafting(folder: Path, config: ModelConfig, tidar: dict[str, Any] | None) -> ModelConfig:
    """`config` with what `tidar`, the content of `tidar.json` in `folder`, adds to it."""
    if tidar is None:
        return config
    drafting = {name: tidar[name] for name in ("mask_token_id", "block_size")}
    try:
        return replace(config, **drafting, **tidar.get("drafting", {}))
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder / TIDAR_FILE}: {error}") from error


def read_record(folder: Path, tidar: dict[str, Any] | None) -> DraftRecord | None:
    """What the content of `tidar.json` says of the drafts' acceptance."""
    measured = None if tidar is None else tidar.get("acceptance")
    if measured is None:
        return None
    try:
        return DraftRecord.from_plain(measured)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / TIDAR_FILE}: acceptance {error}") from error


def folder_config(path: Path, backbone: str) -> ModelConfig:
    """The shape in a `config.json`, for one of `BACKBONES`: `auto` takes the compact transformer
    for what it implements.

    Raises:
        UserError: naming the field of what is not implemented.
    """
    values = read_json(path)
    family = values.get("model_type")
    if backbone == "compact":
        return config_from_values(path, values)
    if backbone == "transformers" or family not in FAMILIES:
        return hosted_config(path, values)
    try:
        return config_from_values(path, values)
    except UserError as refusal:
        try:
            return hosted_config(path, values)
        except UserError:
            raise refusal from None


def config_from_huggingface(path: Path) -> ModelConfig:
    """The shape in a `config.json`, for the compact transformer; raises UserError for what it does
    not implement."""
    return config_from_values(path, read_json(path))


def config_from_values(path: Path, values: dict[str, Any]) -> ModelConfig:
    """`config_from_huggingface` of the content `values`, found at `path`."""
    family = values.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"{path}: model_type {family!r} is not one of {', '.join(FAMILIES)}")
    config = _parse(path, values)
    _refuse_unsupported(path, config)
    rope = config.rope_parameters or {}
    try:
        return ModelConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None)
            or config.hidden_size // config.num_attention_heads,
            vocab_size=config.vocab_size,
            max_positions=config.max_position_embeddings,
            rope_theta=float(rope.get("rope_theta", DEFAULT_ROPE_THETA)),
            rope_scaling=_scaling(rope),
            rms_norm_eps=float(config.rms_norm_eps),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            tie_embeddings=bool(config.tie_word_embeddings),
        )
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{path}: {error}") from error


def _config_class(family: str) -> Any:
    import transformers

    return getattr(transformers, FAMILIES[family].replace("ForCausalLM", "Config"))


def _parse(path: Path, values: dict[str, Any]) -> "PretrainedConfig":
    # The library's own class knows each family's defaults and how its keys were named over time.
    try:
        return _config_class(values["model_type"]).from_dict(values)
    except Exception as error:  # a validation error of its own for every kind of mistake
        raise UserError(f"{path}: {words(error)}") from error


def _scaling(rope: dict[str, Any]) -> dict[str, Any] | None:
    """The stretching of rotary frequencies in a config, None where there is none."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    apart = {"rope_theta", "partial_rotary_factor", "rope_type", "type"}
    numbers = {k: v for k, v in rope.items() if k not in apart and v is not None}
    return {"rope_type": kind, **numbers}


def _refuse_unsupported(path: Path, config: "PretrainedConfig") -> None:
    """What would load and then compute something else is refused, by the name of its field."""
    rope = config.rope_parameters or {}
    biased = getattr(config, "attention_bias", False)
    kinds = getattr(config, "layer_types", None) or ()
    windowed = getattr(config, "sliding_window", None) is not None and (
        "sliding_attention" in kinds or config.model_type == "mistral"
    )
    refused = {
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0)
        if rope.get("partial_rotary_factor", 1.0) != 1.0
        else None,
        "sliding_window": config.sliding_window if windowed else None,
        "hidden_act": config.hidden_act if config.hidden_act != "silu" else None,
        "attention_bias": True if biased else None,
        "mlp_bias": True if getattr(config, "mlp_bias", False) else None,
        "quantization_config": getattr(config, "quantization_config", None),
    }
    for field, value in refused.items():
        if value is not None:
            shown = value if isinstance(value, str | bool | float | int) else "set"
            raise UserError(
                f"{path}: {field} is {shown}, which this model does not implement; "
                "use a model without it"
            )


def config_to_huggingface(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Content of `config.json` for the family's class in transformers.

    Raises:
        UserError: for a shape that no class of theirs has.
    """
    if config.qkv_bias and config.qk_norm:
        raise UserError(
            "checkpoint: the model has both qkv_bias and qk_norm, and no Hugging Face "
            "architecture of these families does; it cannot be exported"
        )
    try:
        theirs = _config_class(config.family)(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            vocab_size=config.num_embeddings,
            max_position_embeddings=config.max_positions,
            rope_parameters={
                **(config.rope_scaling or {"rope_type": "default"}),
                "rope_theta": config.rope_theta,
            },
            rms_norm_eps=config.rms_norm_eps,
            tie_word_embeddings=config.tie_embeddings,
        )
    except Exception as error:  # its validation errors have no common type
        raise UserError(
            f"checkpoint: transformers' {config.family} cannot have this shape ({words(error)})"
        ) from error
    return {
        "architectures": [ARCHITECTURES[config.family]],
        "dtype": str(dtype).removeprefix("torch."),
        **_own_fields(theirs),
        # Where releases before 5 look for it.
        "rope_theta": config.rope_theta,
    }


def _own_fields(config: "PretrainedConfig") -> dict[str, Any]:
    """All fields but those that every config has at the same value."""
    from transformers import PretrainedConfig

    common = PretrainedConfig().to_dict()
    values = config.to_dict()
    kept = {k: v for k, v in values.items() if k not in common or common[k] != v}
    return {**kept, "transformers_version": values["transformers_version"]}


def read_tidar(folder: Path) -> dict[str, Any] | None:
    """The checked content of `tidar.json`, None where there is none."""
    path = folder / TIDAR_FILE
    if not path.exists():
        return None
    values = read_json(path)
    version = values.get("format_version")
    if version not in range(1, FORMAT_VERSION + 1):
        raise UserError(
            f"{path}: format version {version}, this release reads 1 to {FORMAT_VERSION}; update it"
        )
    drafting = values.get("drafting", {})
    if not isinstance(drafting, dict) or not set(drafting) <= set(DRAFTING_FIELDS):
        raise UserError(f"{path}: drafting holds what is unknown; export the model again")
    for field in ("mask_token_id", "block_size"):
        if field not in values or not isinstance(values[field], int | None):
            raise UserError(f"{path}: {field} is missing or not a number; export the model again")
    return values


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the model, after a look at whether they are all there."""
    single, index = folder / WEIGHTS_FILE, folder / INDEX_FILE
    if single.is_file():
        return [single]
    if not index.is_file():
        raise UserError(
            f"{folder}: has neither {WEIGHTS_FILE} nor {INDEX_FILE}; only safetensors are read"
        )
    mapping = read_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise UserError(f"{index}: has no weight_map; the model is damaged")
    files = [folder / name for name in sorted(set(mapping.values()))]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: missing, although {INDEX_FILE} names it")
    return files


def _read(files: list[Path]) -> Iterator[NamedWeight]:
    for path in files:
        with _opened(path) as file:
            shapes = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a dict
        for name, shape in shapes.items():
            if not name.endswith(ROTARY_BUFFER):
                yield NamedWeight(name, path, shape, partial(_tensor, path, name))


def _tensor(path: Path, name: str) -> Tensor:
    with _opened(path) as file:
        return file.get_tensor(name)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file, mapped; raises UserError naming it when it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise UserError(f"{path}: damaged or cut short ({error})") from error


def stored_dtype(files: list[Path]) -> torch.dtype:
    """Type of the embedding, which stands for all."""
    for path in files:
        with _opened(path) as file:
            for name in EMBEDDINGS:
                if name in file.keys():  # noqa: SIM118 - not a dict
                    return file.get_slice(name)[:0].dtype
    raise UserError(f"{files[0].parent}: tensor {EMBEDDING} missing; the model is incomplete")


def _tokenizer(folder: Path, tidar: dict[str, Any] | None) -> Tokenizer:
    """The tokenizer the model was trained with: an export's own, else `tokenizer.json` first."""
    kind = tidar.get("tokenizer", {}).get("kind") if tidar else "huggingface"
    names = [HUGGINGFACE_FILE, SENTENCEPIECE_FILE]
    for name in names if kind == "huggingface" else reversed(names):
        if (folder / name).is_file():
            return load_tokenizer(folder / name)
    return load_tokenizer(folder)


def read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(read_text_checked(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: missing or not JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds no object")
    return values


def words(error: BaseException) -> str:
    return " ".join(str(error).split())
