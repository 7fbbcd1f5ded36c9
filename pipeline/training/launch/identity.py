"""What makes a run the same run, and how a checkpoint differs from what is asked now."""

import json
from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields
from typing import Any

from pipeline.data.mix import mix_identity
from pipeline.model.config import ModelConfig
from pipeline.training.settings import TrainSettings
from tidar_common.errors import UserError


def run_identity(settings: TrainSettings, config: ModelConfig) -> dict[str, Any]:
    """What must not change between the starts of a run, by the name a user knows it by."""
    tokenizer = settings.manifest.tokenizer
    shape = {f"model.{key}": value for key, value in config.to_dict().items()}
    data: dict[str, Any] = {"data fingerprint": settings.manifest.fingerprint()}
    if settings.mix:
        data["data fingerprint"], data["data.mix"] = mix_identity(settings.mix)
    return {
        **data,
        "tokenizer": tokenizer.sha256,
        **shape,
        "seed": settings.seed,
        "precision": settings.precision,
        "global_batch_size": settings.global_batch_size,
        "objective.name": settings.objective.name,
        "freeze_base": settings.freeze_base,
    }


def completed(saved: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """A saved identity with the keys of `asked` that are younger than it, as runs then were."""
    shape = {f"model.{f.name}": f.default for f in fields(ModelConfig) if f.default != MISSING}
    before = json.loads(json.dumps({**shape, "freeze_base": False}))
    return {**{key: value for key, value in before.items() if key in asked}, **saved}


def run_topology(settings: TrainSettings, processes: int) -> dict[str, Any]:
    """What decides how state is partitioned; a continued run may change it."""
    return {
        "processes": processes,
        "deepspeed.stage": settings.deepspeed.stage,
        "deepspeed.offload_optimizer": settings.deepspeed.offload_optimizer,
        "precision": settings.precision,
    }


def differences(saved: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """(saved, asked) of every key that is not the same in both."""
    return {
        key: (saved.get(key), asked.get(key))
        for key in [*asked, *(key for key in saved if key not in asked)]
        if saved.get(key) != asked.get(key)
    }


def refuse_changes(
    name: str, changed: Mapping[str, tuple[Any, Any]], allowed: Collection[str]
) -> None:
    """Raise UserError with every difference that is not among the keys `allowed`."""
    refused = {key: pair for key, pair in changed.items() if key not in allowed}
    if not refused:
        return
    shown = "; ".join(
        f"{key}={was}, this run has {key}={now}" for key, (was, now) in refused.items()
    )
    keys = ",".join(f"'{key}'" if " " in key else key for key in refused)
    raise UserError(
        f"run_dir: checkpoint {name} was made with {shown}; use the same value, start in a new "
        f"run_dir, or continue all the same with checkpoint.allow_changes=[{keys}]"
    )
