"""The DeepSpeed engine as it is before the first step."""

import pytest
import torch
from workers import run_workers

from pipeline.model.config import ModelConfig
from pipeline.model.transformer import Transformer
from pipeline.training.engine import (
    DeepSpeedConfig,
    OptimizerConfig,
    ScheduleConfig,
    build_engine,
    full_copy,
    learning_rate,
)

CONFIG = ModelConfig(
    hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8,
    vocab_size=32,
)  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_all(world) -> dict:
    """Adam's step counts and the weights, of a fresh engine of every kind."""
    found = {}
    for precision, dtype in DTYPES.items():
        for stage in range(4):
            engine = build_engine(
                Transformer(CONFIG).initialize(0).to(dtype), world,
                optimizer=OptimizerConfig(learning_rate=0.5, weight_decay=0.5),
                config=DeepSpeedConfig(stage), precision=precision,
                micro_batch_size=1, accumulation_steps=1,
            )  # fmt: skip
            inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
            steps = [int(state["step"]) for state in inner.state.values() if "step" in state]
            weights = {n: p.detach() for n, p in full_copy(engine, CONFIG).named_parameters()}
            masters = [p.detach().clone() for g in inner.param_groups for p in g["params"]]
            found[precision, stage] = (steps, weights, masters)
    return found


@pytest.fixture(scope="module")
def engines(tmp_path_factory) -> dict:
    return run_workers(build_all, 1, tmp_path_factory.mktemp("engines"))[0]


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("stage", range(4))
def test_building_it_trains_nothing(engines, precision, stage):
    """DeepSpeed's unfused bf16 optimizer takes a step of Adam to allocate its state."""
    steps, weights, masters = engines[precision, stage]
    start = dict(Transformer(CONFIG).initialize(0).to(DTYPES[precision]).named_parameters())
    assert set(steps) <= {0}
    assert weights.keys() == start.keys()
    for name, value in weights.items():
        assert torch.equal(value, start[name]), name
    if stage < 3:  # stage 3 keeps masters in partitions with padding
        total = sum(float(p.double().abs().sum()) for p in start.values())
        kept = sum(float(p.double().abs().sum()) for p in masters)
        assert kept == pytest.approx(total, rel=1e-6)


def test_warms_up_peaks_and_ends_at_the_final_share():
    schedule = ScheduleConfig(warmup_steps=10, final_share=0.1)
    rates = [learning_rate(step, 101, 2.0, schedule) for step in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[100] == pytest.approx(0.2)
    assert rates[55] == pytest.approx((2.0 + 0.2) / 2)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_no_warmup_and_one_step():
    assert learning_rate(0, 1, 1.0, ScheduleConfig(warmup_steps=0)) == 1.0


def test_bad_values():
    with pytest.raises(ValueError, match="warmup_steps"):
        ScheduleConfig(warmup_steps=-1)
    with pytest.raises(ValueError, match="final_share"):
        ScheduleConfig(final_share=2.0)
