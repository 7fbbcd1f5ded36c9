"""The training run's config, checked: each part's dataclass lives with the part that owns it; and
what of it a continued run must keep or may change."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from data_prep.formats.manifest import Manifest
from pipeline.checkpoint.retention import CheckpointConfig
from pipeline.data.mix import MixedSet, mix_identity, open_mix
from pipeline.data.place import DataConfig, open_data_dir
from pipeline.data.source import LayoutChoice
from pipeline.evals.config import DecodeSpeedConfig
from pipeline.model.base import with_base
from pipeline.model.config import AdapterConfig, ModelConfig
from pipeline.objective.config import ObjectiveConfig
from pipeline.training.config import (
    SECTIONS,
    AnomalyConfig,
    ArGuardConfig,
    DeepSpeedConfig,
    MaskGuardConfig,
    OptimizerConfig,
    RunKeys,
    ScheduleConfig,
    WandbConfig,
    WatchConfig,
)
from pipeline.training.trackers.tensorboard import is_installed as tensorboard_is_installed
from tidar_common.config import parse
from tidar_common.errors import UserError
from tidar_common.secrets import without_secrets

SPOKEN = {"true": "full", "false": "none"}
"""Other words for kinds of activation checkpointing."""


def with_adapters(model: ModelConfig, adapter: AdapterConfig, frozen: bool) -> ModelConfig:
    """`model` with what `adapter` adds for mask slots; a `frozen` base gives them an embedding."""
    embedding = adapter.own_mask_embedding
    if embedding is False and frozen:
        raise UserError(
            "adapter.own_mask_embedding: a frozen base's embeddings do not learn; set it to true, "
            "or freeze_base=false"
        )
    return replace(
        model,
        adapter_rank=adapter.rank,
        adapter_targets=adapter.targets if adapter.rank else (),
        own_mask_embedding=frozen if embedding is None else embedding,
    )


def check_tensorboard(wanted: bool) -> None:
    if wanted and not tensorboard_is_installed():
        raise UserError(
            "tensorboard: its package is not installed; pip install -c constraints.txt "
            "-e '.[tensorboard]', or set tensorboard=false"
        )


@dataclass(frozen=True, kw_only=True)
class TrainSettings(RunKeys):
    """Everything a run is told: its keys, checked, and what they name, opened."""

    data_dir: Path
    data: DataConfig
    mix: tuple[MixedSet, ...]
    """The sets of `data.mix`; empty where `data.dir` is all."""
    manifest: Manifest
    model: ModelConfig
    """With the adapters of `adapter`."""
    layout: LayoutChoice
    objective: ObjectiveConfig
    """With a frozen base without the AR term, which nothing that learns has a part in."""
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    deepspeed: DeepSpeedConfig
    checkpoint: CheckpointConfig
    anomalies: AnomalyConfig
    watch: WatchConfig
    decode_speed: DecodeSpeedConfig
    wandb: WandbConfig
    ar_guard: ArGuardConfig
    mask_guard: MaskGuardConfig
    resolved: dict[str, Any]
    """The whole resolved config, for `config.yaml` and W&B."""

    @classmethod
    def from_config(
        cls, cfg: DictConfig, manifest: Manifest | None = None, *, starts: bool | None = None
    ) -> "TrainSettings":
        """Check `cfg`; raises UserError naming the first key that is wrong and the remedy.

        With a `manifest` `data.dir` is not looked at: a plan of a run. Without one a run `starts`,
        unless it is said not to; a run that does not goes without the model at `init_from`, unless
        that gives the shape.
        """
        based = with_base(cfg, needed=manifest is None if starts is None else starts)
        cfg = based.cfg
        data_dir = Path()
        if manifest is None:
            data_dir = open_data_dir(cfg)
        plain = OmegaConf.masked_copy(cfg, [f.name for f in fields(RunKeys)])
        for key in ("preflight", "compile"):  # true and false are YAML's own, too
            plain[key] = str(plain[key]).lower()
        spoken = str(plain.activation_checkpointing).lower()
        plain.activation_checkpointing = SPOKEN.get(spoken, spoken)
        values = dict(vars(parse(RunKeys, plain, "")))
        values["run_dir"] = values["run_dir"].expanduser()
        values["init_from"] = based.init_from or values["init_from"]
        planned = manifest is not None and cfg.data.dir is None
        manifest = manifest or Manifest.load(data_dir)
        sections: dict[str, Any] = {
            name.rpartition(".")[2]: parse(schema, OmegaConf.select(cfg, name), name)
            for name, schema in (SECTIONS | {"model": ModelConfig}).items()
        }
        layout, model, objective = (sections[name] for name in ("layout", "model", "objective"))
        if based.rows is not None:
            model = replace(model, vocab_size=max(based.rows, manifest.tokenizer.vocab_size))
        frozen = values["freeze_base"]
        changed = {
            "model": with_adapters(model, sections.pop("adapter"), frozen),
            "layout": replace(layout, linear=layout.linear or model.linear_drafts),
            "objective": replace(objective, alpha=0.0) if frozen else objective,
        }
        return cls(
            **values | sections | changed,
            data_dir=data_dir,
            mix=() if planned else open_mix(sections["data"], manifest, layout),
            manifest=manifest,
            resolved=without_secrets(OmegaConf.to_container(cfg, resolve=True)),
        )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tensorboard(self.tensorboard)
        if self.freeze_base and self.init_from is None:
            raise UserError(
                "freeze_base: there is no base without init_from; set init_from=... to the model "
                "to convert, or freeze_base=false"
            )
        if self.freeze_base and not self.objective.drafts:
            raise UserError(
                "freeze_base: objective=ar has nothing to train then; set freeze_base=false, or "
                "another objective"
            )
        length, block_size = self.manifest.sequence_length, self.layout.block_size or 0
        if block_size > length:
            raise UserError(
                f"layout.block_size: {block_size} is longer than the data's sequences of {length} "
                "tokens; choose a smaller one"
            )
        if self.compile == "true" and self.deepspeed.stage == 3:
            raise UserError(
                "compile: not with deepspeed=zero3, which gathers weights inside of every layer; "
                "set compile=auto, or deepspeed=zero2"
            )

    def check_device(self, device: torch.device) -> None:
        """Raises UserError for what cannot be done on `device`."""
        if self.attention == "flex" and device.type == "cpu":
            raise UserError(
                "attention: flex has no backward pass on a CPU; set attention=auto, which takes "
                "tiles there"
            )

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches a rank goes through in an optimizer step.

        Raises:
            UserError: when the global batch does not divide.
        """
        per_round = self.micro_batch_size * world_size
        if self.global_batch_size % per_round:
            raise UserError(
                f"global_batch_size: {self.global_batch_size} is not a multiple of "
                f"micro_batch_size {self.micro_batch_size} x {world_size} processes; "
                f"try global_batch_size={-(-self.global_batch_size // per_round) * per_round}"
            )
        return self.global_batch_size // per_round


def with_layout(config: ModelConfig, layout: LayoutChoice) -> ModelConfig:
    """`config` with what of the layout is a part of the model from then on.

    Raises:
        UserError: when that needs a draft head.
    """
    if layout.linear and not config.draft_rank:
        raise UserError(
            "layout.linear: needs a draft head, which knows the tokens that stale slots do not; "
            "set model.draft_rank above 0, or layout.linear=false"
        )
    causal = layout.causal_slots or config.causal_slots
    return replace(config, causal_slots=causal, linear_drafts=layout.linear)


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


def run_topology(settings: TrainSettings, processes: int) -> dict[str, Any]:
    """What decides how state is partitioned; a continued run may change it."""
    return {
        "processes": processes,
        "deepspeed.stage": settings.deepspeed.stage,
        "deepspeed.offload_optimizer": settings.deepspeed.offload_optimizer,
        "precision": settings.precision,
    }


def run_schedule(settings: TrainSettings) -> dict[str, Any]:
    """How the run trains: every key, by its name, of the groups that a continued run may change."""
    fixed = {"objective.name"}
    keys: dict[str, Any] = {"steps": settings.steps}
    for group in ("optimizer", "schedule", "objective", "layout"):
        values = settings.resolved.get(group) or {}
        keys |= {f"{group}.{key}": value for key, value in values.items()}
    return {key: value for key, value in keys.items() if key not in fixed}
