"""Scoring a sequence is what a dense mask of the model's own rule gives."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data_prep.layout import build_layout
from pipeline.data.source import Sequence
from pipeline.model.config import ModelConfig
from pipeline.model.mask import dense_mask
from pipeline.model.transformer import Transformer
from pipeline.objective.scoring import score_sequence

MASK = 13
CONFIG = ModelConfig(
    hidden_size=24, intermediate_size=32, num_layers=2, num_heads=3, num_kv_heads=1, head_dim=8,
    vocab_size=14, mask_token_id=MASK, block_size=4,
)  # fmt: skip


def make_model(causal_slots: bool) -> Transformer:
    model = Transformer(replace(CONFIG, causal_slots=causal_slots)).initialize(1).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8.0)
    return model


@pytest.mark.parametrize("causal_slots", [False, True])
def test_slots_are_scored_by_the_rule_of_the_model(causal_slots):
    rng = np.random.default_rng(0)
    layout = build_layout([9, 1, 6], 4, shift=True, rng=rng)
    tokens = rng.integers(0, MASK, size=16)
    sequence = Sequence(tokens, np.array([9, 1, 6]), 0, layout)
    model = make_model(causal_slots)
    found = score_sequence(model, sequence).diffusion_losses
    ids = torch.cat([torch.from_numpy(tokens), torch.full((layout.num_slots,), MASK)])
    slots = torch.from_numpy(layout.slot_position).long()
    position = torch.cat([torch.arange(16), slots])
    with torch.no_grad():
        mask = dense_mask([9, 1, 6], layout, causal_slots)
        logits = model(ids[None], position, mask)[0, 16:]
        expected = F.cross_entropy(logits, ids[slots], reduction="none").double()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        other = dense_mask([9, 1, 6], layout, not causal_slots)
        wrong = F.cross_entropy(
            model(ids[None], position, other)[0, 16:], ids[slots], reduction="none"
        )
    assert (found - wrong).abs().max() > 0.1, "or the two rules could be confused"
