"""The training run's config, checked: each part's dataclass lives with the part that owns it."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from data_prep.formats.manifest import Manifest
from pipeline.checkpoint.retention import CheckpointConfig
from pipeline.data.mix import MixedSet, open_mix
from pipeline.data.place import DataConfig, open_data_dir
from pipeline.data.source import LayoutChoice
from pipeline.evals.settings import DecodeSpeedConfig
from pipeline.model.adapters import AdapterConfig
from pipeline.model.attention import BACKENDS
from pipeline.model.config import ModelConfig
from pipeline.model.layers import CHECKPOINTING
from pipeline.objective.loss import ObjectiveConfig
from pipeline.training.engine import DeepSpeedConfig, OptimizerConfig
from pipeline.training.guards.anomalies import AnomalyConfig
from pipeline.training.guards.ar_guard import ArGuardConfig
from pipeline.training.guards.mask_embedding import MaskGuardConfig
from pipeline.training.guards.watchdog import WatchConfig
from pipeline.training.launch.signals import deadline
from pipeline.training.schedule import ScheduleConfig
from pipeline.training.trackers.tensorboard import is_installed as tensorboard_is_installed
from pipeline.training.trackers.wandb import WandbConfig
from tidar_common.config import existing_path, parse
from tidar_common.errors import UserError
from tidar_common.secrets import without_secrets

PRECISIONS = ("bf16", "fp32")
PREFLIGHT = ("auto", "true", "false")
SPOKEN = {"true": "full", "false": "none"}
"""Other words for kinds of activation checkpointing."""


@dataclass(frozen=True)
class PlainKeys:
    """The keys of `conf/train.yaml` that stand in no group; they are explained there."""

    run_dir: Path
    steps: int
    seed: int
    init_from: Path | None
    freeze_base: bool
    global_batch_size: int
    micro_batch_size: int
    precision: str
    activation_checkpointing: str
    compile: str
    attention: str
    peak_tflops: float | None
    deterministic: bool
    preflight: str
    stop_before: str | None
    stop_margin_s: float
    log_every_s: float
    tensorboard: bool

    def __post_init__(self) -> None:
        for key, known in (("preflight", PREFLIGHT), ("precision", PRECISIONS),
                           ("activation_checkpointing", CHECKPOINTING),
                           ("attention", BACKENDS)):  # fmt: skip
            if (value := getattr(self, key)) not in known:
                shown = ", ".join(known)
                raise UserError(f"{key}: unknown value {value!r}; known are {shown}")
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise UserError(f"peak_tflops: must be above 0, got {self.peak_tflops}")
        for key, least in (("steps", 1), ("seed", 0), ("global_batch_size", 1),
                           ("micro_batch_size", 1)):  # fmt: skip
            if (number := getattr(self, key)) < least:
                raise UserError(f"{key}: must be at least {least}, got {number}")
        for key in ("stop_margin_s", "log_every_s"):
            if (seconds := getattr(self, key)) < 0:
                raise UserError(f"{key}: must be 0 or more, got {seconds}")
        deadline(self.stop_before, self.stop_margin_s)  # a mistake in it shows now
        check_tensorboard(self.tensorboard)


def with_adapters(model: ModelConfig, adapter: AdapterConfig, frozen: bool) -> ModelConfig:
    """`model` with what `adapter` adds for mask slots; a `frozen` base gives them an embedding."""
    own = adapter.own_mask_embedding
    if own is False and frozen:
        raise UserError(
            "adapter.own_mask_embedding: a frozen base's embeddings do not learn; set it to true, "
            "or freeze_base=false"
        )
    return replace(
        model,
        adapter_rank=adapter.rank,
        adapter_targets=adapter.targets if adapter.rank else (),
        own_mask_embedding=frozen if own is None else own,
    )


def check_tensorboard(wanted: bool) -> None:
    if wanted and not tensorboard_is_installed():
        raise UserError(
            "tensorboard: its package is not installed; pip install -c constraints.txt "
            "-e '.[tensorboard]', or set tensorboard=false"
        )


@dataclass(frozen=True)
class TrainSettings(PlainKeys):
    """Everything a run is told, from `conf/train.yaml` and its overrides."""

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
    def from_config(cls, cfg: DictConfig, manifest: Manifest | None = None) -> "TrainSettings":
        """Check `cfg`; raises UserError naming the first key that is wrong and the remedy.

        With a `manifest` neither `data.dir` nor `init_from` is looked at: a plan of a run.
        """
        data_dir = Path()
        if manifest is None:
            data_dir = open_data_dir(cfg)
        plain = OmegaConf.masked_copy(cfg, [f.name for f in fields(PlainKeys)])
        for key in ("preflight", "compile"):  # true and false are YAML's own, too
            plain[key] = str(plain[key]).lower()
        spoken = str(plain.activation_checkpointing).lower()
        plain.activation_checkpointing = SPOKEN.get(spoken, spoken)
        values = dict(vars(parse(PlainKeys, plain, "")))
        values["run_dir"] = values["run_dir"].expanduser()
        if cfg.init_from is not None and manifest is None:
            values["init_from"] = existing_path(
                cfg, "init_from", "a Hugging Face folder or a checkpoint"
            )
        planned = manifest is not None and cfg.data.dir is None
        data = parse(DataConfig, cfg.data, "data")
        manifest = manifest or Manifest.load(data_dir)
        layout = parse(LayoutChoice, cfg.layout, "layout")
        model = parse(ModelConfig, cfg.model, "model")
        objective = parse(ObjectiveConfig, cfg.objective, "objective")
        return cls(
            **values,
            data_dir=data_dir,
            data=data,
            mix=() if planned else open_mix(data, manifest, layout),
            manifest=manifest,
            model=with_adapters(
                model, parse(AdapterConfig, cfg.adapter, "adapter"), values["freeze_base"]
            ),
            layout=replace(layout, linear=layout.linear or model.linear_drafts),
            objective=replace(objective, alpha=0.0) if values["freeze_base"] else objective,
            optimizer=parse(OptimizerConfig, cfg.optimizer, "optimizer"),
            schedule=parse(ScheduleConfig, cfg.schedule, "schedule"),
            deepspeed=parse(DeepSpeedConfig, cfg.deepspeed, "deepspeed"),
            checkpoint=parse(CheckpointConfig, cfg.checkpoint, "checkpoint"),
            anomalies=parse(AnomalyConfig, cfg.anomalies, "anomalies"),
            watch=parse(WatchConfig, cfg.watch, "watch"),
            decode_speed=parse(DecodeSpeedConfig, cfg.evals.decode_speed, "evals.decode_speed"),
            wandb=parse(WandbConfig, cfg.wandb, "wandb"),
            ar_guard=parse(ArGuardConfig, cfg.ar_guard, "ar_guard"),
            mask_guard=parse(MaskGuardConfig, cfg.mask_guard, "mask_guard"),
            resolved=without_secrets(OmegaConf.to_container(cfg, resolve=True)),
        )

    def __post_init__(self) -> None:
        super().__post_init__()
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
        if self.compile not in ("auto", "true", "false"):
            raise UserError(f"compile: must be auto, true or false, got {self.compile}")
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
