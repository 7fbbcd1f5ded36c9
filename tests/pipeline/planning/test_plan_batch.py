"""Parameters, FLOPs and memory of a batch against real models: counted by other means than ours."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from data_prep.layout import build_layout
from pipeline.model.attention import SectionMasks
from pipeline.model.config import ADAPTER_TARGETS, CHECKPOINTING, ModelConfig
from pipeline.model.flops import allowed_pairs, step_flops
from pipeline.model.mask import dense_mask
from pipeline.model.transformer import Transformer
from pipeline.objective.head_loss import head_loss
from pipeline.objective.loss import MEASURED, Targets
from pipeline.planning.memory import batch_memory, layer_row_bytes

SHAPES = Path(__file__).parents[3] / "conf" / "model"
MODELS = sorted(set(SHAPES.glob("*.yaml")) - {SHAPES / "auto.yaml"})  # which has no shape
CONFIG = ModelConfig(
    hidden_size=64, intermediate_size=160, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16,
    vocab_size=64,
)  # fmt: skip
SEQUENCES, ROWS = 2, 192
SHAPES = {
    "plain": CONFIG,
    "qk_norm": dataclasses.replace(CONFIG, qk_norm=True),
    "qkv_bias and untied": dataclasses.replace(CONFIG, qkv_bias=True, tie_embeddings=False),
}


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_parameters_are_those_of_the_real_model(path):
    config = ModelConfig(**OmegaConf.load(path))
    config = dataclasses.replace(config, vocab_size=config.vocab_size or 4096)
    with torch.device("meta"):
        model = Transformer(config)
    assert config.num_parameters == sum(p.numel() for p in model.parameters())


def training_step(
    config: ModelConfig, dtype: torch.dtype, checkpointing: str, agreement: str = "none"
):
    """A function that runs forward, loss and backward as training does, every row labelled."""
    model = Transformer(config).initialize(0).to(dtype)
    model.checkpoint_activations(checkpointing)
    ids = torch.randint(0, config.num_embeddings, (SEQUENCES, ROWS))
    labels = torch.randint(0, config.num_embeddings, (SEQUENCES * ROWS,))
    mask = torch.ones(SEQUENCES, 1, ROWS, ROWS, dtype=torch.bool)
    targets = Targets(
        rows=torch.arange(SEQUENCES * ROWS),
        labels=labels,
        ar_labels=len(labels) // 2,
        shares=torch.full((len(labels),), 1e-3),
        verifiers=torch.arange(len(labels) // 2 if agreement != "none" else 0),
        agreement=agreement,
        agreement_weight=0.5 if agreement != "none" else 0.0,
        smoothing=0.0,
    )

    def step() -> None:
        loss, _ = model(ids, torch.arange(ROWS), mask, then=partial(head_loss, targets=targets))
        loss.backward()

    step()  # makes the gradients, so that they are not counted below
    return step


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("shape", SHAPES)
def test_flops_are_those_that_are_executed(shape, checkpointing):
    config = SHAPES[shape]
    step = training_step(config, torch.float32, checkpointing)
    # Torch counts attention only where it is made of matrix products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    flops = step_flops(
        config, sequences=SEQUENCES, rows=ROWS, pairs=ROWS * ROWS, checkpointing=checkpointing
    )
    assert counter.get_total_flops() == flops.model + flops.recomputed
    products = counter.get_flop_counts()["Global"]
    attention = products[torch.ops.aten.bmm]
    assert attention == flops.attention * (4 if checkpointing == "full" else 3) // 3


def test_an_agreement_loss_takes_the_head_once_more_for_every_slot():
    """Half of the rows are slots, each compared with one AR distribution."""
    step = training_step(CONFIG, torch.float32, "none", agreement="kl")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    flops = step_flops(
        CONFIG,
        sequences=SEQUENCES,
        rows=ROWS,
        pairs=ROWS * ROWS,
        teacher_rows=ROWS // 2,
    )
    assert counter.get_total_flops() == flops.model


def frozen_step(checkpointing: str):
    """A function that trains adapters on a frozen base, half of the rows slots; and its shape."""
    config = dataclasses.replace(
        CONFIG, adapter_rank=4, adapter_targets=ADAPTER_TARGETS, own_mask_embedding=True,
        mask_token_id=1,
    )  # fmt: skip
    model = Transformer(config).initialize(0).freeze_base().checkpoint_activations(checkpointing)
    ids = torch.ones(SEQUENCES, ROWS, dtype=torch.int64)
    targets = Targets(
        rows=torch.arange(SEQUENCES * ROWS).view(SEQUENCES, 2, -1).transpose(0, 1).flatten(),
        labels=torch.randint(0, config.num_embeddings, (SEQUENCES * ROWS,)),
        ar_labels=SEQUENCES * ROWS // 2,
        shares=torch.full((SEQUENCES * ROWS,), 1e-3),
        verifiers=torch.zeros(0, dtype=torch.int64),
        agreement="none",
        agreement_weight=0.0,
        smoothing=0.0,
        ar_counts=False,
        measured=torch.arange(0, SEQUENCES * ROWS // 2, MEASURED),
    )
    everything = torch.ones(SEQUENCES, 1, ROWS, ROWS, dtype=torch.bool)
    half = ROWS // 2
    masks = SectionMasks(everything[..., :half, :half], everything[..., half:, :])

    def step() -> None:
        then = partial(head_loss, targets=targets)
        model(ids, torch.arange(ROWS), masks, clean=half, then=then)[0].backward()

    step()
    return step, config


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_frozen_base_takes_the_flops_and_the_memory_planned_for(checkpointing):
    step, config = frozen_step(checkpointing)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    flops = step_flops(
        config, sequences=SEQUENCES, rows=ROWS, pairs=ROWS * ROWS, slots=ROWS // 2, frozen=True,
        measured=MEASURED, checkpointing=checkpointing,
    )  # fmt: skip
    if checkpointing == "none":
        products = counter.get_flop_counts()["Global"]
        assert sum(products.values()) - products[torch.ops.aten.bmm] == flops.weights
    most = most_bytes(step, SDPBackend.MATH)
    batch = batch_memory(
        config, precision="fp32", sequences=SEQUENCES, rows=ROWS, checkpointing=checkpointing,
        attention="math", device="cpu", frozen_rows=ROWS // 2,
    )  # fmt: skip
    assert 0.8 * most < batch.peak - batch.mask < 1.25 * most


def most_bytes(step: Callable[[], None], backend: SDPBackend) -> int:
    """The most that tensors take at once during `step`, on top of what was there."""
    with (
        sdpa_kernel(backend),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded,
    ):
        step()
    changes = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held, most = 0, 0
    for change in sorted(changes, key=lambda e: e.start_ns()):
        held += change.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize("attention", ["fused", "math"])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize(
    ("shape", "precision"), [*((shape, "fp32") for shape in SHAPES), ("plain", "bf16")]
)
def test_a_batch_takes_the_memory_planned_for(shape, precision, checkpointing, attention):
    config = SHAPES[shape]
    step = training_step(
        config, torch.bfloat16 if precision == "bf16" else torch.float32, checkpointing
    )
    backend = SDPBackend.MATH if attention == "math" else SDPBackend.FLASH_ATTENTION
    most = most_bytes(step, backend)
    batch = batch_memory(
        config,
        precision=precision,
        sequences=SEQUENCES,
        rows=ROWS,
        checkpointing=checkpointing,
        attention=attention,
        device="cpu",
    )
    # The mask is made before the step here, and training makes it within.
    assert 0.9 * most < batch.peak - batch.mask < 1.15 * most


@pytest.mark.parametrize("shape", SHAPES)
def test_saved_tensors_of_a_layer_are_those_counted(shape):
    """Two models that differ by one layer: what the second saves more, byte for byte."""
    saved = []
    for layers in (1, 2):
        config = dataclasses.replace(SHAPES[shape], num_layers=layers)
        model = Transformer(config).initialize(0)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages: dict[int, torch.Tensor] = {}

        def keep(tensor, weights=weights, storages=storages):
            if tensor.untyped_storage().data_ptr() not in weights:
                storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        ids = torch.randint(0, config.num_embeddings, (SEQUENCES, ROWS))
        mask = torch.ones(SEQUENCES, 1, ROWS, ROWS, dtype=torch.bool)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.hidden(ids, None, mask)
        saved.append(sum(tensor.untyped_storage().nbytes() for tensor in storages.values()))
    per_row = layer_row_bytes(SHAPES[shape], 4, fused_norm=False)
    mask_as_numbers = 4 * SEQUENCES * ROWS * ROWS
    assert saved[1] - saved[0] == SEQUENCES * ROWS * per_row + mask_as_numbers


@pytest.mark.parametrize("coverage", [None, 1.0, 0.5])
@pytest.mark.parametrize("causal", [False, True])
def test_pairs_are_those_of_the_dense_mask(coverage, causal):
    layout = build_layout([50], 8, coverage=coverage or 1.0)
    mask = dense_mask([50], layout, causal)
    expected = mask if coverage is not None else mask[:50, :50]
    assert allowed_pairs(50, 8, coverage, causal) == int(expected.sum())


def test_a_sparse_mask_takes_neither_scores_nor_a_mask():
    kinds = {
        kind: batch_memory(
            CONFIG, precision="bf16", sequences=2, rows=4096, checkpointing="full", attention=kind
        )
        for kind in ("flex", "fused", "math")
    }
    assert kinds["flex"].mask < 0.01 * kinds["fused"].mask
    assert kinds["flex"].peak < kinds["fused"].peak < kinds["math"].peak
    # Twice the rows take twice the memory: 32k tokens can be planned for.
    twice = batch_memory(
        CONFIG, precision="bf16", sequences=2, rows=8192, checkpointing="full", attention="flex"
    )
    assert twice.activations + twice.work == 2 * (kinds["flex"].activations + kinds["flex"].work)
