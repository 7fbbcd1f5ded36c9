"""Static memory and checkpoint sizes of a plan against real DeepSpeed engines on two processes."""

import gc
from pathlib import Path

import pytest
import torch
from workers import run_workers

from pipeline.distributed import World
from pipeline.model.config import ModelConfig
from pipeline.model.transformer import Transformer
from pipeline.planning.memory import checkpoint_bytes, static_memory
from pipeline.training.engine import DeepSpeedConfig, OptimizerConfig, build_engine

CONFIG = ModelConfig(
    hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
    vocab_size=2048, tie_embeddings=True,
)  # fmt: skip
PROCESSES = 2
BUCKET = 1000
# Buckets so small that they do not hide the rest, and no parameter kept whole for being small.
EXTRA = {
    "zero_optimization": {
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
        "stage3_prefetch_bucket_size": BUCKET,
        "stage3_param_persistence_threshold": 0,
    }
}
CASES = [(precision, stage) for precision in ("bf16", "fp32") for stage in (0, 1, 2, 3)]


def live_tensors() -> dict[int, torch.Tensor]:
    """All tensors that Python can reach, gradients included, one for each storage."""
    gc.collect()
    tensors = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None:
                    tensors[tensor.untyped_storage().data_ptr()] = tensor
    return tensors


def most_held(world: World, folder: Path) -> dict:
    """Bytes of one process when gradients are there, and of a checkpoint."""
    results = {}
    for precision, stage in CASES:
        # Kept alive, so that what an earlier engine leaves behind is neither counted nor reused.
        before = live_tensors()
        engine = build_engine(
            Transformer(CONFIG)
            .initialize(0)
            .to(torch.bfloat16 if precision == "bf16" else torch.float32),
            world,
            optimizer=OptimizerConfig(),
            config=DeepSpeedConfig(stage=stage, extra=EXTRA),
            precision=precision,
            micro_batch_size=1,
            accumulation_steps=2,
        )
        held = []
        for number in range(4):
            loss = engine(torch.arange(8)[None]).float().square().mean()
            engine.backward(loss)
            del loss
            if number >= 2:  # the first update has made the optimizer's states
                new = {k: v for k, v in live_tensors().items() if k not in before}
                held.append(sum(tensor.untyped_storage().nbytes() for tensor in new.values()))
                del new
            engine.step()
        place = folder / f"{precision}-{stage}"
        engine.save_checkpoint(str(place), tag="x", save_latest=False)
        world.barrier()
        disk = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
        results[precision, stage] = max(held), disk
        del engine
    return results


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("checkpoints")
    return run_workers(most_held, PROCESSES, tmp_path_factory.mktemp("world"), folder)[0]


@pytest.mark.parametrize(("precision", "stage"), CASES)
def test_static_memory_is_what_an_engine_holds(measured, precision, stage):
    static = static_memory(
        CONFIG, stage=stage, precision=precision, processes=PROCESSES, bucket=BUCKET
    )
    held, _ = measured[precision, stage]
    assert held == pytest.approx(static.weights + static.gradients + static.optimizer, rel=0.05)


@pytest.mark.parametrize(("precision", "stage"), CASES)
def test_checkpoint_size_is_what_an_engine_saves(measured, precision, stage):
    _, disk = measured[precision, stage]
    assert disk == pytest.approx(checkpoint_bytes(CONFIG, stage, precision), rel=0.05)
