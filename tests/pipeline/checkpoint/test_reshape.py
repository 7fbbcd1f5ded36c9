"""State goes from any topology to any other unchanged; a discarded step leaves no trace."""

import math
from pathlib import Path

import pytest
import torch
from small_models import random_model, small_config
from workers import run_workers

from pipeline.checkpoint.read import MOMENTS, WEIGHT, FullState, read_full_state
from pipeline.checkpoint.reshape import load_reshaped
from pipeline.checkpoint.retention import CheckpointConfig
from pipeline.checkpoint.write import Checkpoints, Saved
from pipeline.data.order import TrainState
from pipeline.distributed import World
from pipeline.training.engine import (
    DeepSpeedConfig,
    OptimizerConfig,
    build_engine,
    discard_step,
    set_learning_rate,
)
from pipeline.training.step import apply

CASES = {
    "fp32-0": "fp32-3", "fp32-1": "fp32-3-offload", "fp32-2": "fp32-0", "fp32-3": "fp32-2",
    "bf16-0": "bf16-1", "bf16-1": "bf16-3", "bf16-3": "bf16-0",
    "fp32-2-offload": "fp32-1", "bf16-3-offload": "bf16-2-offload",
    "fp32-0-frozen": "fp32-3-frozen", "fp32-3-frozen": "fp32-1-frozen",
    "bf16-1-frozen": "bf16-0-frozen", "bf16-3-frozen": "bf16-2-frozen",
}  # fmt: skip
"""Precision, stage, whether the optimizer's state is on the host, and whether the base is frozen;
and what each is loaded into next."""
FROZEN = {"adapter_rank": 2, "adapter_targets": ("v_proj", "up_proj")}


def new_engine(world: World, case: str, seed: int):
    precision, stage, *more = case.split("-")
    model = random_model(small_config(**(FROZEN if "frozen" in more else {})), seed).train()
    if "frozen" in more:
        model.freeze_base()
    return build_engine(
        model.to(torch.bfloat16) if precision == "bf16" else model,
        world,
        optimizer=OptimizerConfig(learning_rate=1e-2, gradient_clipping=0.5),
        config=DeepSpeedConfig(stage=int(stage), offload_optimizer="offload" in more),
        precision=precision,
        micro_batch_size=1,
        accumulation_steps=1,
    )


def backward(engine, number: int, world: World, scale: float = 1.0) -> None:
    ids = (torch.arange(12)[None] * (number + 3) + world.rank) % 300
    engine.backward(engine(ids, clean=4).float().square().mean() * scale)


def update(engine, number: int, world: World) -> None:
    backward(engine, number, world)
    set_learning_rate(engine, 1e-2)
    engine.step()


def checkpoints_in(folder: Path, world: World, asynchronous: bool = False) -> Checkpoints:
    config = CheckpointConfig(asynchronous=asynchronous)
    return Checkpoints(folder, world, config, {}, {}, lambda path: None)


def save(engine, world: World, folder: Path, asynchronous: bool = False) -> None:
    checkpoints = checkpoints_in(folder, world, asynchronous)
    outcome = checkpoints.save(engine, TrainState(step=1))
    if asynchronous:
        assert outcome is None
        assert checkpoints.in_flight
        update(engine, 7, world)  # what goes on beside it must not change what is written
        outcome = checkpoints.poll(wait=True)
    assert isinstance(outcome, Saved), outcome


def train_and_save(world: World, folder: Path) -> None:
    """Two updates with discarded and refused ones between them, in every case; then the same
    without. And one update more, in an engine that went back and in one that was started anew."""
    for name in CASES:
        engine = new_engine(world, name, seed=1)
        update(engine, 0, world)
        for scale in (math.nan, 1.0):  # a gradient that is not finite, and one that is
            backward(engine, 5, world, scale)
            set_learning_rate(engine, 1e-2)
            assert math.isnan(discard_step(engine))
        backward(engine, 6, world)
        norms: list[float] = []
        found = apply(engine, 1e-2, lambda norm, norms=norms: norms.append(norm) is None)
        assert found.refused
        assert found.norm == norms[0] > 0
        backward(engine, 1, world)
        assert apply(engine, 1e-2, lambda norm: False).norm > 0
        save(engine, world, folder / name)
        update(engine, 7, world)
        for after, other in (("back", engine), ("anew", new_engine(world, name, seed=2))):
            restored, _ = checkpoints_in(folder / name, world).restore(other, lambda text: None)
            assert restored == TrainState(step=1)
            update(other, 3, world)
            save(other, world, folder / f"{name}-{after}")
        engine = new_engine(world, name, seed=1)
        update(engine, 0, world)
        update(engine, 1, world)
        save(engine, world, folder / f"{name}-straight", asynchronous=True)


def reload_and_save(world: World, source: Path, target: Path) -> None:
    """Load each case into what it is to be next, and save that."""
    for name, following in CASES.items():
        engine = new_engine(world, following, seed=2)
        load_reshaped(engine, source / name / "checkpoints" / "step-00000001")
        save(engine, world, target / name)
        update(engine, 2, world)  # the engine is whole: it can go on


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Saved by two processes, from there by one in another stage, from there by two in a third."""
    root = tmp_path_factory.mktemp("reshape")
    names = ("two", "one", "again")
    paths = {name: root / name for name in names}
    for path in paths.values():
        path.mkdir()
    run_workers(train_and_save, 2, paths["two"], paths["two"])
    run_workers(reload_and_save, 1, paths["one"], paths["two"], paths["one"])
    run_workers(reload_and_save, 2, paths["again"], paths["one"], paths["again"])
    return paths


def state_of(folder: Path, name: str) -> FullState:
    return read_full_state(folder / name / "checkpoints" / "step-00000001")


def assert_equal(left: FullState, right: FullState, updates: int = 2) -> None:
    assert left.shapes == right.shapes
    assert left.updates == right.updates == updates
    assert left.frozen.keys() == right.frozen.keys()
    for name, weight in left.frozen.items():
        assert torch.equal(weight.read(), right.frozen[name].read()), name
    for name in left.shapes:
        for kind in (WEIGHT, *MOMENTS):
            assert torch.equal(left.read(name, kind), right.read(name, kind)), (name, kind)


@pytest.mark.parametrize("name", CASES)
def test_state_survives_other_processes_and_stages(folders, name):
    saved = state_of(folders["two"], name)
    assert ("model.norm.weight" in saved.frozen) == name.endswith("frozen")
    some = "model.layers.0.mlp.up_adapter.up.weight" if saved.frozen else "model.norm.weight"
    assert saved.read(some, "exp_avg").abs().sum() > 0
    assert_equal(saved, state_of(folders["one"], name))
    assert_equal(saved, state_of(folders["again"], name))


@pytest.mark.parametrize("name", CASES)
def test_a_discarded_step_and_a_background_save_leave_no_trace(folders, name):
    """The straight run never had the discarded steps, and was saved while it went on."""
    assert_equal(state_of(folders["two"], name), state_of(folders["two"], f"{name}-straight"))


@pytest.mark.parametrize("name", CASES)
def test_going_back_to_a_checkpoint_is_starting_from_it(folders, name):
    back, anew = (state_of(folders["two"], f"{name}-{how}") for how in ("back", "anew"))
    assert_equal(back, anew, updates=3)
