"""State goes from any topology to any other unchanged; a discarded step leaves no trace."""

import math
from pathlib import Path

import pytest
import torch
from small_models import random_model, small_config
from workers import run_workers

from pipeline.distributed import World
from pipeline.training.checkpoints import Checkpoints, Saved
from pipeline.training.discard import discard_step
from pipeline.training.engine import (
    DeepSpeedConfig,
    OptimizerConfig,
    build_engine,
    set_learning_rate,
)
from pipeline.training.reshape import MOMENTS, WEIGHT, FullState, load_reshaped, read_full_state
from pipeline.training.retention import CheckpointConfig
from pipeline.training.state import TrainState

CASES = [("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 0), ("bf16", 1), ("bf16", 3)]
NEXT = {("fp32", 0): 3, ("fp32", 1): 3, ("fp32", 2): 0, ("fp32", 3): 2,
        ("bf16", 0): 1, ("bf16", 1): 3, ("bf16", 3): 0}  # fmt: skip
"""The stage that each case is loaded into."""


def new_engine(world: World, precision: str, stage: int, seed: int):
    model = random_model(small_config(), seed).train()
    return build_engine(
        model.to(torch.bfloat16) if precision == "bf16" else model,
        world,
        optimizer=OptimizerConfig(learning_rate=1e-2, gradient_clipping=0.5),
        config=DeepSpeedConfig(stage=stage),
        precision=precision,
        micro_batch_size=1,
        accumulation_steps=1,
    )


def backward(engine, number: int, world: World, scale: float = 1.0) -> None:
    ids = (torch.arange(12)[None] * (number + 3) + world.rank) % 300
    engine.backward(engine(ids).float().square().mean() * scale)


def update(engine, number: int, world: World) -> None:
    backward(engine, number, world)
    set_learning_rate(engine, 1e-2)
    engine.step()


def save(engine, world: World, folder: Path, asynchronous: bool = False) -> None:
    config = CheckpointConfig(asynchronous=asynchronous)
    checkpoints = Checkpoints(folder, world, config, {}, {}, lambda path: None)
    outcome = checkpoints.save(engine, TrainState(step=1))
    if asynchronous:
        assert outcome is None
        assert checkpoints.in_flight
        update(engine, 7, world)  # what goes on beside it must not change what is written
        outcome = checkpoints.poll(wait=True)
    assert isinstance(outcome, Saved), outcome


def train_and_save(world: World, folder: Path) -> None:
    """Two updates with a discarded one between them, in every case; then the same without."""
    for precision, stage in CASES:
        name = f"{precision}-{stage}"
        engine = new_engine(world, precision, stage, seed=1)
        update(engine, 0, world)
        for scale in (math.nan, 1.0):  # a gradient that is not finite, and one that is
            backward(engine, 5, world, scale)
            set_learning_rate(engine, 1e-2)
            assert math.isnan(discard_step(engine))
        update(engine, 1, world)
        save(engine, world, folder / name)
        engine = new_engine(world, precision, stage, seed=1)
        update(engine, 0, world)
        update(engine, 1, world)
        save(engine, world, folder / f"{name}-straight", asynchronous=True)


def reload_and_save(world: World, source: Path, target: Path) -> None:
    """Load each case into the stage it is to have next, and save that."""
    for precision, stage in CASES:
        engine = new_engine(world, precision, NEXT[precision, stage], seed=2)
        load_reshaped(engine, source / f"{precision}-{stage}" / "checkpoints" / "step-00000001")
        save(engine, world, target / f"{precision}-{stage}")
        update(engine, 2, world)  # the engine is whole: it can go on


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Saved by two processes, from there by one in another stage, from there by two in a third."""
    root = tmp_path_factory.mktemp("reshape")
    names = ("two", "one", "again", "wide")
    paths = {name: root / name for name in names}
    for path in paths.values():
        path.mkdir()
    run_workers(train_and_save, 2, paths["two"], paths["two"])
    run_workers(reload_and_save, 1, paths["one"], paths["two"], paths["one"])
    run_workers(reload_and_save, 2, paths["again"], paths["one"], paths["again"])
    return paths


def state_of(folder: Path, name: str) -> FullState:
    return read_full_state(folder / name / "checkpoints" / "step-00000001")


def assert_equal(left: FullState, right: FullState) -> None:
    assert left.shapes == right.shapes
    assert left.updates == right.updates == 2
    for name in left.shapes:
        for kind in (WEIGHT, *MOMENTS):
            assert torch.equal(left.read(name, kind), right.read(name, kind)), (name, kind)


@pytest.mark.parametrize(("precision", "stage"), CASES)
def test_state_survives_other_processes_and_stages(folders, precision, stage):
    name = f"{precision}-{stage}"
    saved = state_of(folders["two"], name)
    assert saved.read("model.norm.weight", "exp_avg").abs().sum() > 0
    assert_equal(saved, state_of(folders["one"], name))
    assert_equal(saved, state_of(folders["again"], name))


@pytest.mark.parametrize(("precision", "stage"), CASES)
def test_a_discarded_step_and_a_background_save_leave_no_trace(folders, precision, stage):
    """The straight run never had the discarded steps, and was saved while it went on."""
    name = f"{precision}-{stage}"
    assert_equal(state_of(folders["two"], name), state_of(folders["two"], f"{name}-straight"))
