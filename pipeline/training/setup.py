"""Putting a run together from its settings: model, engine, data, trackers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from data_prep.tokenizers.load import load_tokenizer
from pipeline.checkpoint.write import Checkpoints
from pipeline.data.loader import Share, step_batches
from pipeline.data.mix import MixedSource
from pipeline.data.source import SequenceSource
from pipeline.distributed import World
from pipeline.model.config import ModelConfig
from pipeline.training.engine import build_engine
from pipeline.training.evaluation import PeriodicEval
from pipeline.training.guards.anomalies import Anomalies
from pipeline.training.guards.ar_guard import ArGuard
from pipeline.training.guards.left_out import LeftOutFile
from pipeline.training.guards.mask_embedding import MaskEmbedding
from pipeline.training.guards.skipped_shards import SkippedShards
from pipeline.training.guards.slow_ranks import SlowRanks
from pipeline.training.guards.watchdog import Watchdog
from pipeline.training.launch import preflight
from pipeline.training.launch.identity import run_identity, run_topology
from pipeline.training.launch.run_dir import write_config
from pipeline.training.loop import Trainer
from pipeline.training.settings import TrainSettings, with_layout
from pipeline.training.speed import SpeedMeter
from pipeline.training.start import build_model
from pipeline.training.state import TrainState
from pipeline.training.trackers import Event, Tracker, Trackers, make_event
from pipeline.training.trackers.environment import describe_rank
from pipeline.training.trackers.events import EventsFile
from pipeline.training.trackers.metrics import MetricsFiles
from pipeline.training.trackers.progress import ProgressDisplay
from pipeline.training.trackers.report import Report
from pipeline.training.trackers.tensorboard import TensorBoard
from pipeline.training.trackers.wandb import Wandb
from tidar_common.errors import UserError


def model_config(settings: TrainSettings) -> ModelConfig:
    """The run's model shape, with the data's vocabulary and, unless `ar`, its mask token."""
    tokenizer = settings.manifest.tokenizer
    block_size = settings.layout.block_size or settings.manifest.block_size
    config = settings.model.with_tokens(tokenizer.vocab_size, tokenizer.mask_id, block_size)
    if settings.objective.drafts:
        config = with_layout(config, settings.layout)
    if settings.manifest.sequence_length > config.max_positions:
        raise UserError(
            f"model.max_positions: {config.max_positions}, but the data's sequences have "
            f"{settings.manifest.sequence_length} tokens; raise it or prepare shorter sequences"
        )
    return config if settings.objective.drafts else config.without_drafting()


def build_trainer(
    settings: TrainSettings, world: World, watchdog: Watchdog, say: Callable[[str], None]
) -> Trainer:
    """A trainer ready to run: restored from the newest checkpoint of `run_dir` if there is one."""
    settings.check_device(world.device)
    accumulation_steps = settings.accumulation_steps(world.size)
    source = open_source(settings)
    if isinstance(source, MixedSource):
        say(source.describe(settings.steps * settings.global_batch_size))
    checked = preflight.wanted(settings.preflight, world)
    preflight_s = preflight.check_hosts(settings, source, world, say) if checked else 0.0
    config = model_config(settings)
    model = build_model(settings, config, world, say)
    engine = build_engine(
        model,
        world,
        optimizer=settings.optimizer,
        config=settings.deepspeed,
        precision=settings.precision,
        micro_batch_size=settings.micro_batch_size,
        accumulation_steps=accumulation_steps,
    )
    checkpoints = Checkpoints(
        settings.run_dir,
        world,
        settings.checkpoint,
        run_identity(settings, model.config),
        run_topology(settings, world.size),
        lambda folder: write_extra(folder, settings, model.config),
    )
    state, told = checkpoints.restore(engine, say)
    if state is not None:
        say(f"continuing {settings.run_dir} after step {state.step}")
    state = state or TrainState()
    left_out = LeftOutFile(settings.run_dir, world)
    state.left_out = left_out.ranges(state.left_out)
    alone_share = settings.objective.alone_share if model.config.draft_rank else 0.0
    if checked:
        preflight_s += preflight.try_step(engine, settings, source, world, say, alone_share)
    share = Share(settings.micro_batch_size, accumulation_steps, world.rank, world.size)
    return Trainer(
        settings=settings,
        engine=engine,
        state=state,
        open_batches=lambda state: step_batches(
            source,
            share,
            state.sequences_seen,
            with_slots=settings.objective.drafts,
            alone_share=alone_share,
            causal_slots=model.config.causal_slots,
            left_out=state.left_out,
        ),
        world=world,
        checkpoints=checkpoints,
        periodic_eval=PeriodicEval(settings, model.config, world),
        trackers=build_trackers(settings, world, say),
        watchdog=watchdog,
        slow_ranks=SlowRanks(engine.module, world, settings.watch),
        anomalies=Anomalies(settings.anomalies),
        left_out=left_out,
        skipped_shards=SkippedShards(settings.run_dir, source.damaged_shards, world),
        say=say,
        meter=SpeedMeter(
            model.config,
            world.device,
            world.size,
            precision=settings.precision,
            peak_tflops=settings.peak_tflops,
            frozen=settings.freeze_base,
        ),
        mask_embedding=MaskEmbedding(model.model, model.config.mask_token_id, settings.mask_guard),
        notes=notes_of_start(state, told, checkpoints.load_s, preflight_s, world),
    )


def open_source(settings: TrainSettings) -> SequenceSource | MixedSource:
    """The training sequences: those of `data.dir`, or of all sets of `data.mix`."""
    manifest, batch = settings.manifest, settings.global_batch_size
    seed, layout, data = settings.seed, settings.layout, settings.data
    if settings.mix:
        return MixedSource(settings.mix, manifest, seed, layout, data, batch)
    return SequenceSource(settings.data_dir, manifest, manifest.train, seed, layout, data, batch)


def write_extra(folder: Path, settings: TrainSettings, config: ModelConfig) -> None:
    """What makes a checkpoint folder loadable by itself."""
    config.save(folder / "model.json")
    write_config(folder, settings.resolved)
    load_tokenizer(settings.data_dir).save(folder)


def notes_of_start(
    state: TrainState, told: dict[str, Any], load_s: float, preflight_s: float, world: World
) -> list[Event]:
    """The events of a start: where it begins, and what was passed over or changed."""
    step, name = state.step, told.get("name")
    where = f"from {name}, loaded in {load_s:.1f} s" if name else "from the beginning"
    text = f"{world.size} processes go on {where}" if name else f"{world.size} processes {where}"
    started = {"checkpoint": name, "load_s": load_s if name else None, "processes": world.size}
    started["preflight_s"] = round(preflight_s, 3)
    notes = [make_event("started", step, text, **started)]
    for damaged, reason in told.get("damaged", {}).items():
        notes.append(make_event("checkpoint_damaged", step, reason, name=damaged))
    for key, (was, now) in told.get("changed", {}).items():
        text = f"{key} is {now}, and was {was} until here"
        notes.append(make_event("config_changed", step, text, key=key, was=was, now=now))
    return notes


def build_trackers(settings: TrainSettings, world: World, say: Callable[[str], None]) -> Tracker:
    """All trackers on rank 0, none elsewhere; all ranks call this together."""
    ranks = world.gather(describe_rank(world.device))
    if not world.is_main:
        return Tracker()
    run_dir = settings.run_dir
    told = Trackers(
        [
            MetricsFiles(run_dir),
            EventsFile(run_dir),
            Wandb(run_dir, settings.wandb, settings.resolved, say, ranks),
            ProgressDisplay(settings.steps, Console(), settings.log_every_s),
        ]
    )
    return Trackers(
        [
            told,
            ArGuard(run_dir, settings.ar_guard, say, told.on_event),
            Report(run_dir, say),
            *([TensorBoard(run_dir, say)] if settings.tensorboard else []),
        ]
    )
