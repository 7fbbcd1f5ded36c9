"""A plan's peak memory against whole training steps: everything from the model to the update.

Counted are bytes in tensors as torch's allocator hands them out, the measure of a GPU's
`max_memory_allocated`. The plan is told what a CPU does otherwise: its RMSNorm is not fused, and
the dense mask becomes numbers in each layer.
"""

import gc

import numpy as np
import pytest
from workers import run_workers

from bench.measure import peak_bytes
from data_prep.formats.groups import PackedSequence
from data_prep.layout import build_layout
from pipeline.checkpoint.read import DTYPES
from pipeline.data.batch import Batch, make_batch
from pipeline.distributed import World
from pipeline.model.config import ModelConfig
from pipeline.model.transformer import Transformer
from pipeline.objective.loss import ObjectiveConfig
from pipeline.planning.memory import batch_memory, static_memory
from pipeline.planning.plan import Memory
from pipeline.training.engine import DeepSpeedConfig, OptimizerConfig, build_engine
from pipeline.training.step import StepInput, count_globally, train_step

CONFIG = ModelConfig(
    hidden_size=128, intermediate_size=512, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32,
    vocab_size=512, mask_token_id=4, block_size=8,
)  # fmt: skip
SEQUENCES, LENGTH = 2, 192
BUCKET = 1000
EXTRA = {"zero_optimization": {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}}
CASES = [
    ("fp32", 0, "none"), ("fp32", 1, "selective"), ("fp32", 2, "full"), ("bf16", 0, "none"),
    ("bf16", 1, "full"), ("bf16", 2, "selective"),
]  # fmt: skip


def full_batch() -> Batch:
    rng = np.random.default_rng(0)
    layout = build_layout([LENGTH], 8)
    tokens = [rng.integers(5, 512, size=LENGTH) for _ in range(SEQUENCES)]
    sequences = [PackedSequence(own, np.array([LENGTH]), layout) for own in tokens]
    return make_batch(sequences, 4, LENGTH)


def train(world: World, precision: str, stage: int, checkpointing: str) -> None:
    """A model, its engine, and two optimizer steps: the second has Adam's states from the start."""
    model = Transformer.empty(CONFIG, world.device, DTYPES[precision]).initialize(0)
    model.checkpoint_activations(checkpointing)
    engine = build_engine(
        model, world, optimizer=OptimizerConfig(), config=DeepSpeedConfig(stage, extra=EXTRA),
        precision=precision, micro_batch_size=SEQUENCES, accumulation_steps=1,
    )  # fmt: skip
    objective = ObjectiveConfig()
    for _ in range(2):
        batches = [full_batch()]
        step = StepInput(batches, objective, attention="dense")
        result = train_step(engine, step, count_globally(step, world), world, 1e-3)
        assert result.applied


def measure(world: World) -> dict:
    found = {}
    for case in CASES:
        gc.collect()
        found[case] = peak_bytes(lambda case=case: train(world, *case), world.device)
    return found


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict:
    return run_workers(measure, 1, tmp_path_factory.mktemp("world"))[0]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_whole_run_takes_the_planned_peak(measured, case):
    precision, stage, checkpointing = case
    planned = Memory(
        static=static_memory(
            CONFIG, stage=stage, precision=precision, processes=1, bucket=BUCKET
        ),
        batch=batch_memory(
            CONFIG, precision=precision, sequences=SEQUENCES, rows=2 * LENGTH,
            checkpointing=checkpointing, attention="fused", device="cpu",
        ),
        evaluation=0,  # none here
        host_start=0,
    )  # fmt: skip
    # Neither part alone is the figure.
    assert 0.15 < planned.static.total / planned.peak < 0.85
    assert planned.peak == pytest.approx(measured[case], rel=0.1)
