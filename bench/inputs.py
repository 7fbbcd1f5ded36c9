"""Models and packed sequences to measure with."""

import numpy as np
import torch
from omegaconf import OmegaConf

from data_prep.formats.groups import PackedSequence
from data_prep.layout import build_layout
from pipeline.data.batch import Batch, make_batch, section_length
from pipeline.model.config import ModelConfig
from pipeline.model.transformer import Transformer
from tidar_common.cli import config_dir
from tidar_common.config import parse
from tidar_common.errors import UserError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def model_config(name: str, vocab_size: int, block_size: int) -> ModelConfig:
    """The shape in `conf/model/<name>.yaml` for a vocabulary whose last id is the mask token."""
    path = config_dir() / "model" / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(other.stem for other in path.parent.glob("*.yaml")))
        raise UserError(f"--model: unknown shape {name!r}; known are {known}")
    if vocab_size < 2:
        raise UserError(f"--vocab-size: must be at least 2, got {vocab_size}")
    shape = parse(ModelConfig, OmegaConf.load(path), "model")  # type: ignore[arg-type]
    return shape.with_tokens(vocab_size, vocab_size - 1, block_size)


def precision(name: str) -> torch.dtype:
    if name not in PRECISIONS:
        raise UserError(f"--precision: unknown value {name!r}; known are fp32 and bf16")
    return PRECISIONS[name]


def new_model(config: ModelConfig, dtype: str, device: torch.device) -> Transformer:
    """A model with random weights."""
    return Transformer(config).initialize(0).to(device, precision(dtype))


def random_batch(
    config: ModelConfig, count: int, length: int, document_tokens: int, coverage: float | None
) -> Batch:
    """`count` packed sequences of `length` random tokens; `coverage` None has no mask section.

    Documents have `document_tokens` tokens on average, between half and one and a half times that;
    the same tokens and documents at every coverage.
    """
    if document_tokens < 2:
        raise UserError(f"--document-tokens: must be at least 2, got {document_tokens}")
    mask_token_id, block_size = config.mask_token_id, config.block_size
    assert mask_token_id is not None, "set by model_config"
    assert block_size is not None, "set by model_config"
    rng = np.random.default_rng(0)
    sequences = []
    for number in range(count):
        tokens = rng.integers(0, mask_token_id, size=length)
        lengths = _document_lengths(rng, length, document_tokens)
        layout = build_layout(
            lengths, block_size, coverage=coverage or 1.0, rng=np.random.default_rng(number)
        )
        sequences.append(PackedSequence(tokens, np.array(lengths), layout))
    slots = 0 if coverage is None else section_length(length, coverage, block_size)
    return make_batch(sequences, mask_token_id, slots)


def _document_lengths(rng: np.random.Generator, length: int, mean: int) -> list[int]:
    lengths: list[int] = []
    while (left := length - sum(lengths)) > 0:
        drawn = int(rng.integers(mean // 2, mean + mean // 2, endpoint=True))
        lengths.append(min(max(drawn, 1), left))
    return lengths
