"""What `init_from` says of a run: the shape, vocabulary and precision of the model it starts from,
in place of the keys that a user has not given.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from pipeline.model.config import ModelConfig
from pipeline.model.loading import MAY_DIFFER, check_backbone, open_model, refuse_difference
from pipeline.model.source import SavedModel
from tidar_common.errors import UserError
from tidar_common.hub import fetched
from tidar_common.overrides import nearest

REQUIRED = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads",
            "head_dim")  # fmt: skip
"""Keys of `model` without which there is no shape."""
ADDED = (
    "mask_token_id", "block_size", "adapter_rank", "adapter_targets", "own_mask_embedding",
)  # fmt: skip
"""Fields of a model that a run gets from its data and from other keys."""


@dataclass(frozen=True)
class Based:
    """A run's config with nothing left open that the model at `init_from` decides."""

    cfg: DictConfig
    init_from: Path | None
    """On this machine; None draws the weights."""
    rows: int | None
    """Of the base's embedding, where `model.vocab_size` is not given: the data's tokenizer may have
    a few more ids, for which rows are added."""


def with_base(cfg: DictConfig, needed: bool = True) -> Based:
    """Fill the keys of `model`, and `precision`, that are null by what `init_from` holds.

    Args:
        cfg: a config of `tidar-train`; it stays as it is.
        needed: whether the weights have to be there; a plan goes without where the shape is given.

    Raises:
        UserError: when there is no shape at all, when a key that was given is not what the base
            has, or when there is no model at `init_from`.
    """
    cfg = cfg.copy()
    section = cfg.model
    if not isinstance(section, DictConfig):
        raise UserError("model: expected a group of keys; choose one with model=tiny")
    plain: dict[str, Any] = OmegaConf.to_container(section)  # type: ignore[assignment]
    given = {name: value for name, value in plain.items() if value is not None}
    backbone = str(given.pop("backbone", "auto"))
    check_backbone(backbone)
    missing = [name for name in REQUIRED if name not in given]
    if cfg.init_from is None:
        if missing:
            raise UserError(
                f"model.{missing[0]}: has no value; choose a shape with model=small (or tiny ...), "
                "or the model to start from with init_from=..."
            )
        return Based(_closed(cfg, given, "bf16"), None, None)
    try:
        path, source = open_base(str(cfg.init_from), backbone)
    except UserError:
        if needed or missing:
            raise
        return Based(_closed(cfg, given, "bf16"), None, None)
    known = {field.name for field in fields(ModelConfig)}
    for name in given:
        if name not in known:
            raise UserError(f"model.{name}: unknown key; {nearest(name, known)}")
    values = merged(given, source, cfg.objective.get("name") != "ar")
    rows = None if "vocab_size" in given else source.config.num_embeddings
    precision = "fp32" if source.dtype == torch.float32 else "bf16"
    return Based(_closed(cfg, values, precision), path, rows)


def open_base(
    init_from: str, backbone: str = "auto", verify: bool = False
) -> tuple[Path, SavedModel]:
    """Where the model `init_from` is on this machine, and all of it but its weights; `verify` has a
    checkpoint's files compared with their hashes."""
    path = fetched(init_from, "init_from")
    try:
        return path, open_model(path, verify=verify, backbone=backbone)
    except UserError as error:
        raise UserError(f"init_from: {error}") from error


def merged(given: dict[str, Any], source: SavedModel, drafts: bool) -> dict[str, Any]:
    """The keys of `model`: those `given`, which must be the base's, and for the others the base's.
    A draft head may be anything where the base has none, or where the run trains none."""
    values = dict(given)
    left = {*ADDED, "vocab_size"}
    if not source.config.draft_rank or not drafts:
        left |= {"draft_rank", "draft_cell", "draft_width", "linear_drafts"}
    for name, value in source.config.to_dict().items():
        if name in ("hosted", "hosted_elements"):
            values[name] = value
        elif (
            name not in left and values.setdefault(name, value) != value and name not in MAY_DIFFER
        ):
            refuse_difference(name, value, values[name], source.folder)
    return values


def _closed(cfg: DictConfig, values: dict[str, Any], precision: str) -> DictConfig:
    OmegaConf.set_struct(cfg, False)
    cfg.model = values
    if cfg.precision is None:
        cfg.precision = precision
    OmegaConf.set_struct(cfg, True)
    return cfg
