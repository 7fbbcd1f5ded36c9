"""The training run's config, checked: each part's dataclass lives with the part that owns it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from data_prep.config import existing_path, parse, require
from data_prep.errors import UserError
from data_prep.manifest import Manifest
from pipeline.data.source import LayoutChoice
from pipeline.evals.settings import DecodeSpeedConfig
from pipeline.model.config import ModelConfig
from pipeline.objective.joint import ObjectiveConfig
from pipeline.training.callbacks.wandb import WandbConfig
from pipeline.training.checkpoints import CheckpointConfig
from pipeline.training.engine import DeepSpeedConfig, OptimizerConfig
from pipeline.training.schedule import ScheduleConfig

PRECISIONS = ("bf16", "fp32")


@dataclass(frozen=True)
class TrainSettings:
    """Everything a run is told, from `conf/train.yaml` and its overrides."""

    run_dir: Path
    data_dir: Path
    manifest: Manifest
    steps: int
    seed: int
    global_batch_size: int
    micro_batch_size: int
    precision: str
    activation_checkpointing: bool
    init_from: Path | None
    model: ModelConfig
    layout: LayoutChoice
    objective: ObjectiveConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    deepspeed: DeepSpeedConfig
    checkpoint: CheckpointConfig
    decode_speed: DecodeSpeedConfig
    wandb: WandbConfig
    log_every_s: float
    resolved: dict[str, Any]
    """The whole resolved config, for `config.yaml` and W&B."""

    @classmethod
    def from_config(cls, cfg: DictConfig) -> "TrainSettings":
        """Check `cfg`; raises UserError naming the first key that is wrong and the remedy."""
        require(cfg, "data.dir", "run_dir", "steps", "seed", "global_batch_size")
        require(cfg, "micro_batch_size", "precision")
        data_dir = existing_path(cfg, "data.dir", "a folder written by tidar-prepare")
        precision = str(cfg.precision)
        if precision not in PRECISIONS:
            raise UserError(f"precision: unknown value {precision!r}; known are bf16 and fp32")
        for key in ("steps", "global_batch_size", "micro_batch_size"):
            if int(cfg[key]) < 1:
                raise UserError(f"{key}: must be at least 1, got {cfg[key]}")
        init_from = None
        if cfg.init_from is not None:
            init_from = existing_path(cfg, "init_from", "a Hugging Face folder or a checkpoint")
        return cls(
            run_dir=Path(str(cfg.run_dir)).expanduser(),
            data_dir=data_dir,
            manifest=Manifest.load(data_dir),
            steps=int(cfg.steps),
            seed=int(cfg.seed),
            global_batch_size=int(cfg.global_batch_size),
            micro_batch_size=int(cfg.micro_batch_size),
            precision=precision,
            activation_checkpointing=bool(cfg.activation_checkpointing),
            init_from=init_from,
            model=parse(ModelConfig, cfg.model, "model"),
            layout=parse(LayoutChoice, cfg.layout, "layout"),
            objective=parse(ObjectiveConfig, cfg.objective, "objective"),
            optimizer=parse(OptimizerConfig, cfg.optimizer, "optimizer"),
            schedule=parse(ScheduleConfig, cfg.schedule, "schedule"),
            deepspeed=parse(DeepSpeedConfig, cfg.deepspeed, "deepspeed"),
            checkpoint=parse(CheckpointConfig, cfg.checkpoint, "checkpoint"),
            decode_speed=parse(DecodeSpeedConfig, cfg.evals.decode_speed, "evals.decode_speed"),
            wandb=parse(WandbConfig, cfg.wandb, "wandb"),
            log_every_s=float(cfg.log_every_s),
            resolved=OmegaConf.to_container(cfg, resolve=True),  # type: ignore[arg-type]
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
