"""Scoring a sequence is what a dense mask of the model's own rule gives."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data_prep.formats.groups import PackedSequence
from data_prep.layout import build_layout
from pipeline.decoding.step import prefill_mask
from pipeline.evals.acceptance import Controls, score_drafts
from pipeline.evals.scoring import score_sequence
from pipeline.model.attention import training_mask
from pipeline.model.config import ModelConfig
from pipeline.model.mask import dense_mask
from pipeline.model.transformer import Transformer

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


@pytest.mark.parametrize("first", [0, 1, 3])
@torch.no_grad()
def test_stale_slots_are_scored_block_by_block(first):
    """Acceptance of the drafts that a linear step has when `first` tokens are new behind its block,
    one block and place at a time, each by forwards of its own."""
    rng, size = np.random.default_rng(0), 4
    config = replace(CONFIG, draft_rank=5, draft_width=6, linear_drafts=True)
    model = Transformer(config).initialize(1).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0.0, 0.5)
    head = model.draft_head
    lengths, tokens = [13, 1, 6], rng.integers(0, MASK, size=20)
    layout = build_layout(lengths, size, shift=True, rng=rng)
    sequence = PackedSequence(tokens, np.array(lengths), layout)
    count, accepted = torch.zeros(size - 1), torch.zeros(2, size - 1)
    for begin, start, end in zip(
        layout.prefix_start, layout.prefix_end, layout.draft_end, strict=True
    ):
        document_end = next(int(e) for e in np.cumsum(lengths) if e > start)
        if start == begin:
            continue
        text = torch.from_numpy(tokens[begin:document_end])
        seen, slots = int(start - begin), min(2 * size - 1, int(document_end - start))
        ids = torch.cat([text[:seen], torch.full((slots,), MASK)])[None]
        mask = prefill_mask(0, seen, slots, torch.device("cpu"))
        block = model.hidden(ids, torch.arange(seen + slots), mask)[0, seen:]
        causal = model.hidden(text[None])[0]
        state, _ = head.first(causal[max(seen + first - 1, 0)])
        for place in range(1, int(end - start)):
            position = seen + first + place
            if position >= len(text):
                break
            h = block[first + place]
            told = head.token_parts(model.model.embed_tokens(text[position - 1]))
            z, state = head.cell.step(head.slot_parts(h) + told, state)
            q = torch.softmax(model.lm_head(h) + head.up(z), -1)
            p = torch.softmax(model.lm_head(causal[position - 1]), -1)
            count[place - 1] += 1
            accepted[0, place - 1] += p.argmax() == q.argmax()
            accepted[1, place - 1] += torch.minimum(p, q).sum()
    controls = Controls(torch.full((14,), 1 / 14))
    found = score_drafts(model, [sequence], size, controls, first)
    assert torch.equal(found.drafts, count.double())
    torch.testing.assert_close(found.accepted["model"], accepted.double(), rtol=1e-4, atol=1e-5)
    assert count.sum() > 3
    if first == 0:
        assert found.diffusion_tokens == 20, "each position once, as of blocks of K"


@pytest.mark.parametrize("causal_slots", [False, True])
def test_slots_are_scored_by_the_rule_of_the_model(causal_slots):
    rng = np.random.default_rng(0)
    layout = build_layout([9, 1, 6], 4, shift=True, rng=rng)
    tokens = rng.integers(0, MASK, size=16)
    sequence = PackedSequence(tokens, np.array([9, 1, 6]), layout)
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


def test_sequences_with_any_padding_are_scored_in_one_shape(monkeypatch):
    """Each shape of attention is compiled by itself on a GPU."""
    rng, shapes, model = np.random.default_rng(0), set(), make_model(causal_slots=False)

    def seen(spans, *arguments):
        shapes.add(tuple(spans.block.shape))
        return training_mask(spans, *arguments)

    monkeypatch.setattr("pipeline.evals.scoring.training_mask", seen)
    for real in (16, 13, 9, 5):
        lengths = np.array([real, 16 - real][: 1 + (real < 16)])
        layout = build_layout(lengths[:1], 4, shift=True, rng=rng)
        tokens = rng.integers(0, MASK, size=16)
        padding = 16 - real
        sequence = PackedSequence(tokens, lengths, layout, padding=padding)
        found = score_sequence(model, sequence)
        ids = torch.from_numpy(tokens[:real])[None]
        with torch.no_grad():
            expected = F.cross_entropy(model(ids)[0, :-1], ids[0, 1:], reduction="none")
        torch.testing.assert_close(found.ar_losses, expected.double(), rtol=1e-4, atol=1e-5)
        assert len(found.diffusion_losses) == layout.num_slots
    assert shapes == {(1, 32)}
