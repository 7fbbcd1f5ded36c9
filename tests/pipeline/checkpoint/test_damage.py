"""Every file of a checkpoint, damaged in every way: never loaded, named, and left alone."""

import shutil
from pathlib import Path

import pytest
import torch
from small_models import random_model, small_config
from workers import run_workers

from bench.reliability import DAMAGE, damage
from pipeline.checkpoint.retention import CheckpointConfig
from pipeline.checkpoint.write import Checkpoints, Saved
from pipeline.data.order import TrainState
from pipeline.distributed import World
from pipeline.training.engine import (
    DeepSpeedConfig,
    OptimizerConfig,
    build_engine,
    set_learning_rate,
)
from tidar_common.errors import UserError


def write_extra(folder: Path) -> None:
    for name in ("model.json", "config.yaml", "tokenizer.model"):
        (folder / name).write_text(f"what stands in {name}\n")


def checkpoints_in(run_dir: Path, world: World) -> Checkpoints:
    return Checkpoints(run_dir, world, CheckpointConfig(), {}, {}, write_extra)


def build(world: World):
    return build_engine(
        random_model(small_config(), seed=1).train(), world,
        optimizer=OptimizerConfig(learning_rate=1e-2), config=DeepSpeedConfig(stage=2),
        precision="fp32", micro_batch_size=1, accumulation_steps=1,
    )  # fmt: skip


def damage_and_restore(world: World, folder: Path) -> list[tuple[str, str, int | None, str, bool]]:
    """For each file and way: the step that was restored, what was said, and whether all files are
    still there as they were. The last entry has both checkpoints damaged."""
    engine = build(world)
    source = folder / "run"
    for step in (1, 2):
        set_learning_rate(engine, 1e-2)
        engine.backward(engine(torch.arange(12)[None]).float().square().mean())
        engine.step()
        outcome = checkpoints_in(source, world).save(engine, TrainState(step=step))
        assert isinstance(outcome, Saved), outcome
    names = sorted(path.name for path in (source / "checkpoints" / "step-00000002").iterdir())
    found: list[tuple[str, str, int | None, str, bool]] = []
    for number, (name, how) in enumerate([(n, h) for n in names for h in DAMAGE]):
        run_dir = folder / f"copy-{number}"
        newest = run_dir / "checkpoints" / "step-00000002"
        if world.is_main:
            shutil.copytree(source, run_dir)
            damage(newest / name, how)
            if number + 1 == len(names) * len(DAMAGE):
                damage(newest.with_name("step-00000001") / name, how)
        before = world.from_main(
            contents(run_dir) if world.is_main else None
        )  # while it is damaged
        said: list[str] = []
        restored = None
        try:
            state, _ = checkpoints_in(run_dir, world).restore(engine, said.append)
            restored = state.step if state else None
        except UserError as error:
            said.append(str(error))
        found.append((name, how, restored, " ".join(said), contents(run_dir) == before))
        world.barrier()
    return found


def contents(run_dir: Path) -> dict[str, bytes]:
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    return {path.relative_to(run_dir).as_posix(): path.read_bytes() for path in files}


def test_every_damage_to_every_file_is_passed_over(tmp_path):
    main, other = run_workers(damage_and_restore, 2, tmp_path, tmp_path)
    assert [row[:3] for row in main] == [row[:3] for row in other]
    kinds = {name.split("_")[0].split(".")[0] for name, *_ in main}
    assert kinds == {"config", "files", "model", "mp", "state", "tokenizer", "zero"}
    assert {how for _, how, *_ in main} == set(DAMAGE)
    for name, how, restored, said, untouched in main[:-1]:
        assert restored == 1, (name, how, said)
        assert "checkpoint step-00000002 is damaged and left alone" in said
        assert name in said or name == "files.json", (name, how, said)  # it names all others
        assert untouched, (name, how)
    _, _, restored, said, untouched = main[-1]
    assert restored is None
    assert "all checkpoints are damaged; restore one or use a new run_dir" in said
    assert untouched


@pytest.mark.parametrize("how", DAMAGE)
def test_the_damage_is_damage(tmp_path, how):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    damage(path, how)
    assert not path.exists() or path.read_bytes() != bytes(range(100))
