"""Putting a run together from its settings: model, engine, data, guards, trackers."""

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from data_prep.tokenizers.load import load_tokenizer
from pipeline.checkpoint.read import DTYPES
from pipeline.checkpoint.write import Checkpoints
from pipeline.data.batch import Batch, Share, step_batches
from pipeline.data.mix import MixedSource
from pipeline.data.order import TrainState
from pipeline.data.place import check_shards
from pipeline.data.source import SequenceSource, Source
from pipeline.distributed import World
from pipeline.model.base import open_base
from pipeline.model.config import ModelConfig
from pipeline.model.loading import check_shape, check_tokenizer, load_into
from pipeline.model.parameters import Opening, whole
from pipeline.model.source import SavedModel
from pipeline.model.transformer import Transformer
from pipeline.model.transformers_backbone import empty_model
from pipeline.training.due import PeriodicEval, Saver
from pipeline.training.engine import build_engine, deepspeed_log, deepspeed_settings
from pipeline.training.guards.anomalies import Anomalies, LeftOutFile, Rollbacks
from pipeline.training.guards.ar_guard import ArGuard
from pipeline.training.guards.mask_embedding import MaskEmbedding
from pipeline.training.guards.skipped_shards import SkippedShards
from pipeline.training.guards.watchdog import SlowRanks, Watchdog
from pipeline.training.launch import preflight
from pipeline.training.launch.run_dir import write_config
from pipeline.training.loop import Trainer
from pipeline.training.moments import Event, Guards, Moments, Together, Tracker, make_event
from pipeline.training.settings import (
    TrainSettings,
    run_identity,
    run_schedule,
    run_topology,
    with_layout,
)
from pipeline.training.speed import SpeedMeter
from pipeline.training.trackers.environment import (
    describe_environment,
    describe_rank,
    write_environment,
)
from pipeline.training.trackers.metrics import EventsFile, MetricsFiles
from pipeline.training.trackers.progress import ProgressDisplay, describe_run
from pipeline.training.trackers.report import Report
from pipeline.training.trackers.tensorboard import TensorBoard
from pipeline.training.trackers.wandb import Wandb
from tidar_common.errors import UserError
from tidar_common.progress import doing
from tidar_common.run_files import DEEPSPEED_LOG

Say = Callable[[str], None]
"""Tells the user something, on rank 0."""


def build_trainer(settings: TrainSettings, world: World, watchdog: Watchdog, say: Say) -> Trainer:
    """A trainer ready to run: restored from the newest checkpoint of `run_dir` if there is one."""
    settings.check_device(world.device)
    check_data(settings, world, say)
    source = open_sequences(settings, say)
    checked = preflight.wanted(settings.preflight, world)
    preflight_s = preflight.check_hosts(settings, source, world, say) if checked else 0.0
    config = model_config(settings)
    say(describe_run(settings, config, world.size, world.device))
    doing("making the model")
    engine = start_engine(settings, config, world, say)
    checkpoints = open_checkpoints(settings, config, world)
    doing("looking for a checkpoint")
    state, restored = checkpoints.restore(engine, say)
    if state is not None:
        say(f"continuing {settings.run_dir} after step {state.step}")
    state = state or TrainState()
    left_out = LeftOutFile(settings.run_dir, world)
    state.left_out = left_out.ranges(state.left_out)
    if checked:
        share = alone_share(settings, config)
        preflight_s += preflight.try_step(engine, settings, source, world, say, share)

    doing("making evals and trackers ready")
    evals = PeriodicEval(settings, config, world, say)
    trackers = build_trackers(settings, world, say)
    anomalies = Anomalies(settings.anomalies)
    mask_embedding = MaskEmbedding(engine.module.model, config.mask_token_id, settings.mask_guard)
    skipped_shards = SkippedShards(settings.run_dir, source.damaged_shards, world)
    slow_ranks = SlowRanks(engine.module, world, settings.watch)
    ar_guard = ArGuard(settings.run_dir, settings.ar_guard, say)
    guards = Guards(
        [watchdog, skipped_shards, mask_embedding, anomalies, slow_ranks, ar_guard],
        report=trackers.on_event,
    )
    moments = Together([guards, trackers])
    return Trainer(
        settings=settings,
        engine=engine,
        state=state,
        open_batches=partial(open_batches, settings, config, source, world),
        world=world,
        moments=moments,
        guards=guards,
        mask_embedding=mask_embedding,
        skipped_shards=skipped_shards,
        rollbacks=Rollbacks(anomalies, left_out),
        saver=Saver(engine, checkpoints, moments, guards, state.step),
        evals=evals,
        meter=SpeedMeter(
            config,
            world.device,
            world.size,
            precision=settings.precision,
            peak_tflops=settings.peak_tflops,
            frozen=settings.freeze_base,
        ),
        say=say,
        notes=notes_of_start(state, restored, checkpoints.load_s, preflight_s, world),
    )


def model_config(settings: TrainSettings) -> ModelConfig:
    """The run's model shape, with the data's vocabulary and, unless `ar`, its mask token."""
    config = drafting_config(settings)
    return config if settings.objective.drafts else config.without_drafting()


def drafting_config(settings: TrainSettings) -> ModelConfig:
    """The same with what drafts also for `ar`, whose plan says what drafting would take.

    Raises:
        UserError: when the data's sequences are longer than the model's positions.
    """
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
    return config


def check_data(settings: TrainSettings, world: World, say: Say) -> None:
    """Look on every node whether the training shards are there; raises UserError on all ranks
    where one is not, unless `data.skip_damaged` is on."""
    doing("looking for the data")
    problem = None
    try:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            for line in shards_left_out(settings):
                say(f"warning: {line}")
    except UserError as error:
        problem = str(error)
    problems = [text for text in world.gather(problem) if text is not None]
    if problems:
        raise UserError(problems[0])


def shards_left_out(settings: TrainSettings) -> list[str]:
    """What a run with `data.skip_damaged` goes without, a line for each set of its training data.

    Raises:
        UserError: naming the first shard that is not there, for a run without.
    """
    sets = [(f"data.mix.{part.name}.dir", part.dir, part.manifest) for part in settings.mix]
    lines = [
        check_shards(folder, manifest.train.shards, key, skip_damaged=settings.data.skip_damaged)
        for key, folder, manifest in sets or [("data.dir", settings.data_dir, settings.manifest)]
    ]
    return [line for line in lines if line is not None]


def open_sequences(settings: TrainSettings, say: Say = lambda text: None) -> Source:
    """The training sequences: those of `data.dir`, or of all sets of `data.mix`."""
    manifest, batch = settings.manifest, settings.global_batch_size
    seed, layout, data = settings.seed, settings.layout, settings.data
    if not settings.mix:
        return SequenceSource(
            settings.data_dir, manifest, manifest.train, seed, layout, data, batch
        )
    source = MixedSource(settings.mix, manifest, seed, layout, data, batch)
    say(source.describe(settings.steps * batch))
    return source


def open_batches(
    settings: TrainSettings, config: ModelConfig, source: Source, world: World, state: TrainState
) -> Generator[list[Batch]]:
    """The batches of this rank in the steps after `state`, read ahead until they are closed."""
    accumulation_steps = settings.accumulation_steps(world.size)
    share = Share(settings.micro_batch_size, accumulation_steps, world.rank, world.size)
    return step_batches(
        source,
        share,
        state.sequences_seen,
        with_slots=settings.objective.drafts,
        alone_share=alone_share(settings, config),
        causal_slots=config.causal_slots,
        left_out=state.left_out,
    )


def alone_share(settings: TrainSettings, config: ModelConfig) -> float:
    """Share of the blocks that are drafted by the head alone as well: none without a draft head."""
    return settings.objective.alone_share if config.draft_rank else 0.0


def start_engine(settings: TrainSettings, config: ModelConfig, world: World, say: Say) -> Any:
    """The engine around a new model (`build_model`); what DeepSpeed has to tell goes to a file."""
    model = build_model(settings, config, world, say)
    with deepspeed_log(settings.run_dir / DEEPSPEED_LOG if world.is_main else Path(os.devnull)):
        return build_engine(
            model,
            world,
            optimizer=settings.optimizer,
            config=settings.deepspeed,
            precision=settings.precision,
            micro_batch_size=settings.micro_batch_size,
            accumulation_steps=settings.accumulation_steps(world.size),
        )


def build_model(
    settings: TrainSettings, config: ModelConfig, world: World, say: Say
) -> Transformer:
    """The model of a new run, drawn from the seed or read from `init_from`; all ranks call it.

    Raises:
        UserError: when the weights at `init_from` cannot be used.
    """
    source = open_start(settings, config)
    if source is not None:
        say(f"init_from: {source}")
    model, opened = allocate(settings, config, world)
    if source is None:
        model.initialize(settings.seed, opened)
    else:
        mask = load_into(model, source, opened, settings.seed)
        if mask is not None:
            say(f"mask token {config.mask_token_id}: embedding with {mask}")
    if settings.freeze_base:
        model.freeze_base()
    model.checkpoint_activations(settings.activation_checkpointing)
    compiled = config.hosted is None and compiles_layers(settings, world, say)
    return model.compile_layers() if compiled or settings.compile == "true" else model


def compiles_layers(settings: TrainSettings, world: World, say: Say) -> bool:
    """Whether layers are compiled: `compile`, where `auto` is on a GPU whose compiler works on all
    ranks, without ZeRO 3; all ranks call it."""
    if settings.compile != "auto":
        return settings.compile == "true"
    if world.device.type != "cuda" or settings.deepspeed.stage == 3:
        return False
    reason = next(filter(None, world.gather(why_not_compiled(world.device))), None)
    if reason is not None:
        say(
            f"compile: layers run uncompiled, which is slower: {reason}; mend it (Triton and a C "
            "compiler are needed), or set compile=false"
        )
    return reason is None


def why_not_compiled(device: torch.device) -> str | None:
    """What torch.compile says of the smallest function on `device`; None where it works."""
    try:
        torch.compile(lambda x: x.sin() + 1, dynamic=False)(torch.zeros(8, device=device))
    except Exception as error:  # whatever a broken compiler raises
        return (str(error).strip() or type(error).__name__).split("\n")[0]
    return None


def open_start(
    settings: TrainSettings, config: ModelConfig, verify: bool = True
) -> SavedModel | None:
    """The model at `init_from`, its weights not yet read; None for a run that draws its own. To
    `verify` a checkpoint takes minutes where it is large.

    Raises:
        UserError: when it is no model of this shape, or the data has another tokenizer.
    """
    if settings.init_from is None:
        return None
    backbone = "compact" if config.hosted is None else "transformers"
    _, source = open_base(str(settings.init_from), backbone, verify)
    check_shape(source, config)
    check_tokenizer(source, settings.data_dir)
    return source


def allocate(
    settings: TrainSettings, config: ModelConfig, world: World
) -> tuple[Transformer, Opening]:
    """A model whose weights are yet to be set, and how to open them for that."""
    if settings.deepspeed.stage < 3:
        return empty_model(config, world.device, DTYPES[settings.precision]), whole
    if config.hosted is not None:
        raise UserError(
            "deepspeed: zero3 cuts up the compact transformer alone; set deepspeed=zero2 for "
            "model.backbone=transformers"
        )
    import deepspeed

    accumulation = settings.accumulation_steps(world.size)
    cutting = deepspeed.zero.Init(
        config_dict_or_path=deepspeed_settings(
            settings.optimizer,
            settings.deepspeed,
            settings.precision,
            settings.micro_batch_size,
            accumulation,
        ),
        # The type follows from these settings; given by itself, DeepSpeed ignores it on a CPU.
        # Its replacement of `F.linear` saves memory that torch's own no longer takes.
        mem_efficient_linear=False,
    )
    with cutting:
        model = Transformer(config)
    return model, opened_by_rank_0(world)


def opened_by_rank_0(world: World) -> Opening:
    """Gathers a parameter on all ranks; what rank 0 writes into it is what all keep."""
    import deepspeed

    @contextmanager
    def opened(parameter: nn.Parameter) -> Iterator[bool]:
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            yield world.is_main

    return opened


def open_checkpoints(settings: TrainSettings, config: ModelConfig, world: World) -> Checkpoints:
    def write_extra(folder: Path) -> None:
        """What makes a checkpoint folder loadable by itself."""
        config.save(folder / "model.json")
        write_config(folder, settings.resolved)
        load_tokenizer(settings.data_dir).save(folder)

    return Checkpoints(
        settings.run_dir,
        world,
        settings.checkpoint,
        run_identity(settings, config),
        run_topology(settings, world.size),
        write_extra,
        run_schedule(settings),
    )


def notes_of_start(
    state: TrainState, restored: dict[str, Any], load_s: float, preflight_s: float, world: World
) -> list[Event]:
    """The events of a start: where it begins, and what was passed over or changed."""
    step, name = state.step, restored.get("name")
    where = f"from {name}, loaded in {load_s:.1f} s" if name else "from the beginning"
    text = f"{world.size} processes go on {where}" if name else f"{world.size} processes {where}"
    started = {"checkpoint": name, "load_s": load_s if name else None, "processes": world.size}
    started["preflight_s"] = round(preflight_s, 3)
    notes = [make_event("started", step, text, **started)]
    for damaged, reason in restored.get("damaged", {}).items():
        notes.append(make_event("checkpoint_damaged", step, reason, name=damaged))
    for key, (was, now) in restored.get("changed", {}).items():
        text = f"{key} is {now}, and was {was} until here"
        if key == "steps":
            text += "; the learning rate's schedule ends with the new number"
        notes.append(make_event("config_changed", step, text, key=key, was=was, now=now))
    return notes


def build_trackers(settings: TrainSettings, world: World, say: Say) -> Moments:
    """All trackers on rank 0, none elsewhere; all ranks call this together."""
    ranks = world.gather(describe_rank(world.device))
    if not world.is_main:
        return Tracker()
    run_dir = settings.run_dir
    write_environment(run_dir, describe_environment(ranks))
    return Together(
        [
            MetricsFiles(run_dir),
            EventsFile(run_dir),
            Wandb(run_dir, settings.wandb, settings.resolved, say, ranks),
            ProgressDisplay(settings.steps, Console(), settings.log_every_s),
            Report(run_dir, say),
            *([TensorBoard(run_dir, say)] if settings.tensorboard else []),
        ]
    )
