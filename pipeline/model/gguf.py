"""GGUF files as a source of weights, dequantised; read by transformers."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.tokenizers.load import load_tokenizer
from pipeline.model.config import ModelConfig
from pipeline.model.huggingface import FAMILIES, config_from_values, words
from pipeline.model.source import NamedWeight, SavedModel
from tidar_common.errors import UserError

DTYPE = torch.bfloat16
"""What weights are dequantised to: no type of the format that models come in holds more."""
ROTARY_FACTORS = "rope_freqs.weight"
"""Llama 3's stretching of rotary frequencies, which transformers' reader passes over in silence."""
HEADER_BYTES = 1 << 26
"""The names of a file's tensors stand within these first bytes, behind a vocabulary of 10 MB."""


def open_gguf(path: Path) -> SavedModel:
    """The model in the GGUF file `path`.

    Raises:
        UserError: naming the file, and what of it this model cannot represent.
    """

    @cache
    def tensors() -> dict[str, Tensor]:
        return _dequantised(path)

    def weights(wanted: torch.dtype) -> Iterator[NamedWeight]:
        for name, tensor in tensors().items():
            yield NamedWeight(name, path, tensor.shape, tensor.contiguous)

    return SavedModel(
        folder=path,
        config=gguf_config(path),
        dtype=DTYPE,
        weights=weights,
        tokenizer=lambda: load_tokenizer(path),
        remark="; dequantised from GGUF: finer than its blocks it is not",
    )


def gguf_config(path: Path) -> ModelConfig:
    """The shape in a GGUF file; raises UserError as `open_gguf`."""
    return config_from_values(path, _values(path))


def _values(path: Path) -> dict[str, Any]:
    """The config, in the words of transformers."""
    status = path.stat()
    return dict(_values_of(path, status.st_size, status.st_mtime_ns))


@cache
def _values_of(path: Path, size: int, changed: int) -> dict[str, Any]:
    """Kept as long as the file stays: the reader walks through the vocabulary, which takes seconds,
    and a start asks for the config several times."""
    with path.open("rb") as file:
        header = file.read(HEADER_BYTES)
    if ROTARY_FACTORS.encode() in header:
        raise UserError(
            f"{path}: holds {ROTARY_FACTORS}, which the reader does not apply; take the "
            "model's Hugging Face folder, whose config.json has rope_scaling"
        )
    return dict(_load(path)["config"])


def _load(path: Path, **options: Any) -> dict[str, Any]:
    # Imported here: it takes seconds.
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    try:
        return dict(load_gguf_checkpoint(str(path), **options))
    except ImportError as error:
        raise UserError(
            f"{path}: GGUF files need the package gguf; pip install 'tidar-pretrain[gguf]'"
        ) from error
    except (ValueError, KeyError, OSError, IndexError) as error:
        raise UserError(f"{path}: not a GGUF file that can be read ({words(error)})") from error


def _dequantised(path: Path) -> dict[str, Tensor]:
    """All tensors, under the names of transformers."""
    import transformers

    values = _values(path)
    name = FAMILIES[values["model_type"]]
    config = getattr(transformers, name.replace("ForCausalLM", "Config")).from_dict(values)
    with torch.device("meta"):
        model = getattr(transformers, name)(config)
    loaded = _load(path, return_tensors=True, model_to_load=model, torch_dtype=DTYPE)
    return dict(loaded["tensors"])
