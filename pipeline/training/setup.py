"""Putting a run together from its settings: model, engine, data, callbacks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from data_prep.config import config_hash
from data_prep.errors import UserError
from data_prep.tokenizers import load_tokenizer
from pipeline.data.loader import Share, step_batches
from pipeline.data.source import SequenceSource
from pipeline.model.config import ModelConfig
from pipeline.model.transformer import Transformer
from pipeline.training.callbacks import Callback, Callbacks
from pipeline.training.callbacks.metrics import MetricsFiles
from pipeline.training.callbacks.progress import ProgressDisplay
from pipeline.training.callbacks.report import Report
from pipeline.training.callbacks.tensorboard import TensorBoard
from pipeline.training.callbacks.wandb import Wandb
from pipeline.training.checkpoints import Checkpoints
from pipeline.training.distributed import World
from pipeline.training.engine import build_engine
from pipeline.training.evaluation import PeriodicEval
from pipeline.training.loop import Trainer
from pipeline.training.settings import TrainSettings
from pipeline.training.state import TrainState


def model_config(settings: TrainSettings) -> ModelConfig:
    """The run's model shape, with the data's vocabulary and, unless `ar`, its mask token."""
    tokenizer = settings.manifest.tokenizer
    block_size = settings.layout.block_size or settings.manifest.block_size
    config = settings.model.with_tokens(tokenizer.vocab_size, tokenizer.mask_id, block_size)
    if settings.manifest.sequence_length > config.max_positions:
        raise UserError(
            f"model.max_positions: {config.max_positions}, but the data's sequences have "
            f"{settings.manifest.sequence_length} tokens; raise it or prepare shorter sequences"
        )
    return config if settings.objective.drafts else config.without_drafting()


def build_model(settings: TrainSettings, config: ModelConfig) -> Transformer:
    """The model before the first step: drawn from the seed, or read from `init_from`."""
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    if settings.init_from is not None:
        from pipeline.model.loading import initialize_from

        model = initialize_from(settings.init_from, config)
    else:
        model = Transformer(config).initialize(settings.seed)
    model.model.activation_checkpointing = settings.activation_checkpointing
    return model.to(dtype)


def run_identity(settings: TrainSettings, config: ModelConfig) -> dict[str, Any]:
    """What must not change between the starts of a run, by the name a user knows it by."""
    return {
        "data fingerprint": settings.manifest.fingerprint(),
        "model": config_hash(config.to_dict()),
        "seed": settings.seed,
        "precision": settings.precision,
        "global_batch_size": settings.global_batch_size,
        "deepspeed.stage": settings.deepspeed.stage,
        "objective.name": settings.objective.name,
    }


def build_trainer(settings: TrainSettings, world: World, say: Callable[[str], None]) -> Trainer:
    """A trainer ready to run: restored from the newest checkpoint of `run_dir` if there is one."""
    accumulation_steps = settings.accumulation_steps(world.size)
    config = model_config(settings)
    model = build_model(settings, config)
    engine = build_engine(
        model,
        world,
        optimizer=settings.optimizer,
        config=settings.deepspeed,
        precision=settings.precision,
        micro_batch_size=settings.micro_batch_size,
        accumulation_steps=accumulation_steps,
    )
    identity = run_identity(settings, model.config)
    checkpoints = Checkpoints(settings.run_dir, world, settings.checkpoint.keep_last)
    state = checkpoints.restore(engine, identity, say)
    if state is not None:
        say(f"continuing {settings.run_dir} after step {state.step}")
    state = state or TrainState()
    manifest = settings.manifest
    source = SequenceSource(
        settings.data_dir, manifest, manifest.train, settings.seed, settings.layout, settings.data
    )
    share = Share(settings.micro_batch_size, accumulation_steps, world.rank, world.size)
    return Trainer(
        settings=settings,
        engine=engine,
        state=state,
        batches=step_batches(
            source, share, state.sequences_seen, with_slots=settings.objective.drafts
        ),
        world=world,
        checkpoints=checkpoints,
        periodic_eval=PeriodicEval(settings, model.config, world),
        callbacks=build_callbacks(settings, world, say),
        identity=identity,
        write_extra=lambda folder: write_extra(folder, settings, model.config),
    )


def write_extra(folder: Path, settings: TrainSettings, config: ModelConfig) -> None:
    """What makes a checkpoint folder loadable by itself."""
    config.save(folder / "model.json")
    write_config(folder, settings)
    load_tokenizer(settings.data_dir).save(folder)


def write_config(folder: Path, settings: TrainSettings) -> None:
    (folder / "config.yaml").write_text(yaml.safe_dump(settings.resolved, sort_keys=False))


def build_callbacks(settings: TrainSettings, world: World, say: Callable[[str], None]) -> Callback:
    """All callbacks on rank 0, none elsewhere."""
    if not world.is_main:
        return Callback()
    run_dir = settings.run_dir
    return Callbacks(
        [
            MetricsFiles(run_dir),
            Wandb(run_dir, settings.wandb, settings.resolved, say),
            ProgressDisplay(settings.steps, Console(), settings.log_every_s),
            Report(run_dir, say),
            *([TensorBoard(run_dir, say)] if settings.tensorboard else []),
        ]
    )
