"""What saving costs: seconds for each GB at once and in the background, and steps beside it."""

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoint.retention import CheckpointConfig
from pipeline.checkpoint.write import Checkpoints, Saved
from pipeline.data.order import TrainState
from pipeline.distributed import World, joined_world
from pipeline.model.config import ModelConfig
from pipeline.model.transformer import Transformer
from pipeline.training.config import DeepSpeedConfig, OptimizerConfig
from pipeline.training.engine import build_engine

LAYER_PARAMETERS = 12 * 512 * 512
GB = 1e9


def time_saving(folder: Path, parameters_m: int) -> dict[str, Any]:
    """Figures of one process under ZeRO-1 in fp32, whose model has about `parameters_m` million."""
    layers = max(1, round(parameters_m * 1e6 / LAYER_PARAMETERS))
    config = ModelConfig(
        hidden_size=512, intermediate_size=1365, num_layers=layers, num_heads=8, num_kv_heads=8,
        head_dim=64, vocab_size=512, max_positions=256,
    )  # fmt: skip
    with joined_world() as world:
        engine = build_engine(
            Transformer(config).initialize(0), world,
            optimizer=OptimizerConfig(), config=DeepSpeedConfig(stage=1), precision="fp32",
            micro_batch_size=1, accumulation_steps=1,
        )  # fmt: skip
        alone_s = [step(engine) for _ in range(6)][1:]
        at_once = save(engine, world, folder / "at-once", asynchronous=False)
        behind, beside_s = save_beside_steps(engine, world, folder / "behind")
    gigabytes = at_once.bytes / GB
    usual_s = statistics.median(alone_s)
    lost_s = sum(beside_s) - usual_s * len(beside_s)
    return {
        "checkpoint GB": gigabytes,
        "checkpoint: seconds per GB at once": at_once.total_s / gigabytes,
        "checkpoint: seconds per GB in the background": behind.total_s / gigabytes,
        "checkpoint: of them held, in the background": behind.held_s / gigabytes,
        "step seconds": usual_s,
        "steps beside a background save": len(beside_s),
        "step seconds lost to a background save": lost_s,
    }


def step(engine: Any) -> float:
    """One update on 128 tokens; its seconds."""
    started = time.perf_counter()
    engine.backward(engine(torch.arange(128)[None]).float().square().mean())
    engine.step()
    return time.perf_counter() - started


def checkpoints_in(folder: Path, world: World, asynchronous: bool) -> Checkpoints:
    config = CheckpointConfig(asynchronous=asynchronous)
    return Checkpoints(folder, world, config, {}, {}, lambda path: None)


def save(engine: Any, world: World, folder: Path, *, asynchronous: bool) -> Saved:
    outcome = checkpoints_in(folder, world, asynchronous).save(engine, TrainState(step=1))
    assert isinstance(outcome, Saved), outcome
    return outcome


def save_beside_steps(engine: Any, world: World, folder: Path) -> tuple[Saved, list[float]]:
    """A background save, and the seconds of the steps that ran until it was complete."""
    checkpoints = checkpoints_in(folder, world, True)
    checkpoints.save(engine, TrainState(step=1))
    seconds: list[float] = []
    outcome = None
    while outcome is None:
        seconds.append(step(engine))
        outcome = checkpoints.poll(wait=False)
    assert isinstance(outcome, Saved), outcome
    return outcome, seconds
