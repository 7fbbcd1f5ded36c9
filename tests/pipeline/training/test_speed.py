"""FLOPs of a step by counting pairs one by one, and what is known of devices."""

import numpy as np
import pytest
import torch
from small_models import small_config

from data_prep.formats.groups import PackedSequence
from data_prep.layout import build_layout
from pipeline.data.batch import make_batch
from pipeline.model.mask import dense_mask
from pipeline.planning.hardware import DEVICE_NAMES, GPUS, recognise
from pipeline.training.speed import SpeedMeter
from pipeline.training.step import GlobalCounts

CPU = torch.device("cpu")


def sequences() -> list[PackedSequence]:
    """Documents, a shifted grid, part of the blocks, and padding."""
    made = []
    for seed, (lengths, padding) in enumerate([([9, 14, 5], 4), ([32], 0), ([1, 20], 11)]):
        rng = np.random.default_rng(seed)
        layout = build_layout(lengths, 5, coverage=0.6, shift=True, rng=rng)
        documents = np.array([*lengths, padding] if padding else lengths)
        made.append(
            PackedSequence(rng.integers(5, 300, size=32), documents, layout, padding=padding)
        )
    return made


@pytest.mark.parametrize("slots", [0, 32])
@pytest.mark.parametrize("causal", [False, True])
def test_pairs_are_those_of_the_dense_mask_without_padding_and_spare_slots(slots, causal):
    made = sequences()
    batch = make_batch(made, 4, slots, causal_slots=causal)
    assert batch.spans.causal_slots is causal
    expected = 0
    for sequence in made:
        real = int(sequence.real_lengths.sum())
        mask = dense_mask(sequence.real_lengths, sequence.layout, causal)
        expected += int(mask.sum()) if slots else int(mask[:real, :real].sum())
    assert batch.attention_pairs == expected


@pytest.mark.parametrize("teacher_rows", [0, 30])
def test_model_flops_are_weights_times_rows_and_pairs(teacher_rows):
    config = small_config()
    counts = GlobalCounts(
        ar_labels=50, diffusion_labels=30, clean_tokens=60, stop_requests=0, draft_weight=30.0,
        attention_pairs=1000, teacher_rows=teacher_rows,
    )  # fmt: skip
    speed = SpeedMeter(config, CPU, 2, precision="fp32", peak_tflops=1e-3).measure(counts, 0.5)
    head = config.num_embeddings * config.hidden_size
    matrices = sum(p.numel() for name, p in named_matrices(config) if "layers" in name)
    attention = config.num_layers * 4 * config.num_heads * config.head_dim * 1000
    flops = 3 * (2 * matrices * 90 + 2 * head * 80 + attention) + 2 * head * teacher_rows
    assert speed.model_tflops == pytest.approx(flops / 0.5 / 2 / 1e12)
    assert speed.mfu == pytest.approx(speed.model_tflops / 1e-3)
    assert speed.peak_memory_bytes > 10 * 2**20


def test_with_a_frozen_base_only_slots_go_backward_and_few_ar_rows_meet_the_head():
    config = small_config()
    counts = GlobalCounts(
        ar_labels=50, diffusion_labels=30, clean_tokens=60, stop_requests=0, draft_weight=30.0,
        attention_pairs=900, teacher_rows=30,
    )  # fmt: skip
    meter = SpeedMeter(config, CPU, 1, precision="fp32", peak_tflops=None, frozen=True)
    head = config.num_embeddings * config.hidden_size
    matrices = sum(p.numel() for name, p in named_matrices(config) if "layers" in name)
    pair = config.num_layers * 4 * config.num_heads * config.head_dim
    layers = 2 * matrices * (60 + 30 + 30)
    heads = 2 * head * (30 + 30 + 30 + 50 // 8)  # forward, teacher, backward; the AR loss's sample
    attention = pair * (900 + 2 * 300)  # a third of the rows are slots
    flops = layers + heads + attention
    assert meter.measure(counts, 0.5).model_tflops == pytest.approx(flops / 0.5 / 1e12)


def named_matrices(config):
    from pipeline.model.transformer import Transformer

    with torch.device("meta"):
        model = Transformer(config)
    return [(name, p) for name, p in model.named_parameters() if p.ndim == 2]


def test_a_device_without_a_known_peak_has_no_utilisation():
    counts = GlobalCounts(1, 1, 2, 0, 1.0, 3)
    meter = SpeedMeter(small_config(), CPU, 1, precision="bf16", peak_tflops=None)
    assert meter.measure(counts, 1.0).mfu is None


def test_devices_are_known_by_the_names_that_cuda_gives():
    assert set(DEVICE_NAMES.values()) == set(GPUS)
    found = recognise("NVIDIA H100 80GB HBM3")
    assert found is not None
    assert found.tflops("bf16") == 989.0
    assert recognise("NVIDIA H100 PCIe") is None
