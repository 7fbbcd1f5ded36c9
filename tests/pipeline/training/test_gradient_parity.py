"""The same global batch gives the same gradient and the same weights however it is divided.

ZeRO 0 to 3; one process with four micro-batches, two processes with two; and plain autograd over
the whole batch in one piece as the oracle. Sequences have very different numbers of labels, so
that a mean of means would show.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from workers import run_workers

from data_prep.formats.groups import PackedSequence
from data_prep.layout import build_layout
from pipeline.data.batch import Batch, make_batch
from pipeline.distributed import World
from pipeline.model.config import ModelConfig
from pipeline.model.transformer import Transformer
from pipeline.objective.loss import ObjectiveConfig
from pipeline.training.engine import DeepSpeedConfig, OptimizerConfig, build_engine, full_copy
from pipeline.training.step import (
    StepInput,
    accumulate,
    apply,
    count_globally,
    digests_in_order,
    train_step,
)

CONFIG = ModelConfig(
    hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
    vocab_size=19, mask_token_id=18, block_size=3, qkv_bias=True,
)  # fmt: skip
OBJECTIVE = ObjectiveConfig(alpha=0.5)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, gradient_clipping=0.5)
STAGES = (0, 1, 2, 3)
LENGTH = 16


def sequence(number: int) -> PackedSequence:
    """Some full, some mostly padding, some of many documents."""
    rng = np.random.default_rng(number)
    lengths, padding = [([16], 0), ([1] * 8, 8), ([3], 13), ([7, 2, 7], 0)][number % 4]
    tokens = rng.integers(1, 18, size=LENGTH)
    documents = np.array([*lengths, padding] if padding else lengths)
    layout = build_layout(lengths, 3, shift=True, rng=rng)
    return PackedSequence(tokens, documents, layout, padding=padding)


def batches_of(numbers: list[int]) -> list[Batch]:
    return [make_batch([sequence(n)], CONFIG.mask_token_id, LENGTH) for n in numbers]


def new_engine(world: World, stage: int, precision: str, rounds: int):
    model = Transformer(CONFIG).initialize(0)
    if precision == "bf16":
        model = model.to(torch.bfloat16)
    return build_engine(
        model,
        world,
        optimizer=OPTIMIZER,
        config=DeepSpeedConfig(stage=stage),
        precision=precision,
        micro_batch_size=1,
        accumulation_steps=rounds,
    )


def full_gradients(engine, stage: int) -> dict[str, torch.Tensor]:
    from deepspeed.utils import safe_get_full_grad

    return {
        name: (p.grad if stage == 0 else safe_get_full_grad(p)).clone()
        for name, p in engine.module.named_parameters()
    }


def work(world: World) -> dict:
    """Two steps under each stage; gradients of the first, losses and weights after both."""
    rounds = 4 // world.size
    results = {}
    for precision in ("fp32", "bf16"):
        for stage in STAGES:
            engine = new_engine(world, stage, precision, rounds)
            numbers = [
                [s * 4 + a * world.size + world.rank for a in range(rounds)] for s in range(2)
            ]
            steps = [StepInput(batches_of(own), OBJECTIVE) for own in numbers]
            counts = count_globally(steps[0], world, stop_requested=world.rank == 1)
            sums = accumulate(engine, steps[0], counts, world)
            gradients = full_gradients(engine, stage) if precision == "fp32" else {}
            norm = apply(engine, 1e-2).norm
            counted = count_globally(steps[1], world)
            second = train_step(engine, steps[1], counted, world, 1e-2)
            results[precision, stage] = {
                "counts": counts,
                "sums": world.sum(sums),
                "gradients": gradients,
                "norm": norm,
                "second": second,
                "weights": dict(full_copy(engine, CONFIG).named_parameters()),
                "digests": digests_in_order(steps[0].batches, world),
            }
    return results


@pytest.fixture(scope="module")
def divided(tmp_path_factory) -> dict[int, dict]:
    return {
        size: run_workers(work, size, tmp_path_factory.mktemp(f"world{size}"))[0] for size in (1, 2)
    }


@pytest.fixture(scope="module")
def oracle():
    """Loss and gradients of the whole global batch by plain autograd."""
    model = Transformer(CONFIG).initialize(0)
    batch = make_batch([sequence(n) for n in range(4)], CONFIG.mask_token_id, LENGTH)
    logits = model(
        batch.input_ids, batch.position_ids, batch.spans.dense().unsqueeze(1), rows=batch.rows
    )
    losses = F.cross_entropy(logits, batch.labels, reduction="none")
    ar, diffusion = losses[: batch.ar_labels], losses[batch.ar_labels :]
    loss = (OBJECTIVE.alpha * ar.mean() + diffusion.mean()) / (1 + OBJECTIVE.alpha)
    loss.backward()
    sums = [loss.item(), ar.sum().item(), diffusion.sum().item(), 0.0, 0.0]
    return batch, sums, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_gradients_are_those_of_the_global_batch(divided, oracle, size, stage):
    batch, sums, gradients = oracle
    result = divided[size]["fp32", stage]
    assert result["counts"].ar_labels == batch.ar_labels
    assert result["counts"].diffusion_labels == batch.diffusion_labels
    assert result["counts"].clean_tokens == batch.clean_tokens
    assert result["counts"].attention_pairs == batch.attention_pairs
    assert result["counts"].stop_requests == size - 1
    assert result["sums"] == pytest.approx(sums, rel=1e-5)
    assert result["gradients"].keys() == gradients.keys()
    for name, expected in gradients.items():
        torch.testing.assert_close(result["gradients"][name], expected, atol=1e-6, rtol=1e-4)
    norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
    assert result["norm"] == pytest.approx(float(norm), rel=1e-4)


@pytest.mark.parametrize(
    ("precision", "tolerance", "bound"), [("fp32", 2e-4, 1e-5), ("bf16", 3e-2, 3e-3)]
)
@pytest.mark.parametrize("stage", STAGES)
def test_two_steps_are_the_same_in_one_and_two_processes(
    divided, precision, tolerance, bound, stage
):
    one, two = (divided[size][precision, stage] for size in (1, 2))
    assert two["second"].loss_ar == pytest.approx(one["second"].loss_ar, rel=tolerance)
    assert two["second"].loss_diffusion == pytest.approx(
        one["second"].loss_diffusion, rel=tolerance
    )
    assert two["second"].grad_norm == pytest.approx(one["second"].grad_norm, rel=10 * tolerance)
    # Adam moves a weight by the rate whatever its gradient's size, so where a gradient is all
    # rounding its sign may differ: compare on average.
    for name, expected in one["weights"].items():
        assert float((two["weights"][name] - expected).detach().abs().mean()) < bound


def test_ranks_have_different_numbers_of_labels():
    """Guards the tests above: where all have the same, a rank's own number would do."""
    of_rank = [batches_of(numbers) for numbers in ([0, 2], [1, 3])]
    for labels in ("ar_labels", "diffusion_labels"):
        first, second = (sum(getattr(b, labels) for b in batches) for batches in of_rank)
        assert first != second, labels


def test_all_stages_agree(divided):
    base = divided[2]["fp32", 0]["second"]
    for stage in STAGES[1:]:
        other = divided[2]["fp32", stage]["second"]
        assert other.loss == pytest.approx(base.loss, rel=1e-4)
        assert other.grad_norm == pytest.approx(base.grad_norm, rel=1e-3)


def test_digests_are_in_the_order_of_the_run(divided):
    expected = [batch.digests for batch in batches_of([0, 1, 2, 3])]
    for size in (1, 2):
        assert divided[size]["fp32", 0]["digests"] == expected


def test_clipping_and_training_change_the_weights(divided, oracle):
    """Guards the tests above against comparing nothing with nothing."""
    start = dict(Transformer(CONFIG).initialize(0).named_parameters())
    for stage in STAGES:
        result = divided[2]["fp32", stage]
        assert result["norm"] > OPTIMIZER.gradient_clipping
        moved = [float((result["weights"][n] - p).abs().max()) for n, p in start.items()]
        assert min(moved) > 1e-3
