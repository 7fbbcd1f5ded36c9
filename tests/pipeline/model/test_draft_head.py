"""The sequential draft head against its formulas, one block and one place at a time."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_models import random_model, small_config

from data_prep.formats.groups import PackedSequence
from data_prep.layout import build_layout
from pipeline.data.batch import make_batch
from pipeline.model.attention import training_mask
from pipeline.model.config import DRAFT_CELLS
from pipeline.model.draft_head import unit
from pipeline.model.transformer import Transformer
from pipeline.objective.head_loss import head_loss
from pipeline.objective.loss import ObjectiveConfig, make_targets

LENGTHS = [7, 1, 5, 6]


def make_model(cell: str, **changes) -> Transformer:
    config = small_config(draft_rank=5, draft_cell=cell, draft_width=6, **changes)
    return random_model(config, seed=3).double()


def make_inputs(shift: bool = True, share: float = 0.6, coverage: float = 1.0):
    rng = np.random.default_rng(1)
    sequences = []
    for lengths in (LENGTHS, [19]):
        layout = build_layout(lengths, 4, rng=rng, shift=shift, coverage=coverage)
        tokens = rng.integers(5, 300, size=19).astype(np.uint16)
        sequences.append(PackedSequence(tokens, np.array(lengths), layout))
    return sequences, make_batch(sequences, 4, 19, alone_share=share)


def gru(cell, part, state):
    """torch's own formula, gates in our order."""
    gates = cell.state(state)
    width = len(state)
    r = torch.sigmoid(part[:width] + gates[:width])
    u = torch.sigmoid(part[width : 2 * width] + gates[width : 2 * width])
    n = torch.tanh(part[2 * width :] + r * gates[2 * width :])
    return (1 - u) * n + u * state


def slow_z(model, slot, before, row, count):
    """z of places 1 … count - 1 of one block; `slot(i)` is what stands for h_i."""
    head, found = model.draft_head, []
    state = torch.tanh(head.cell.start(unit(row))) if model.config.draft_cell == "gru" else None
    for place in range(1, count):
        token = unit(model.model.embed_tokens.weight[before[place]])
        part = head.cell.slot(unit(slot(place))) + head.cell.token(token)
        if state is not None:
            state = gru(head.cell, part, state)
            found.append(head.cell.down(state))
        elif model.config.draft_cell == "mlp":
            found.append(head.cell.down(F.silu(part)))
        else:
            found.append(part)
    return found


@pytest.mark.parametrize("cell", DRAFT_CELLS)
@pytest.mark.parametrize("coverage", [1.0, 0.5])
@torch.no_grad()
def test_rows_are_the_formulas_place_by_place(cell, coverage):
    model = make_model(cell)
    sequences, batch = make_inputs(coverage=coverage)
    width = batch.input_ids.shape[1]
    hidden = torch.randn(2 * width, 32, dtype=torch.float64)
    drafts = model.drafts(hidden, batch.blocks)
    expected_z = torch.zeros(len(drafts.hidden), 5, dtype=torch.float64)
    expected_hidden = [*hidden]
    alone = batch.blocks.alone.tolist()
    longest, number = batch.blocks.slots.shape[1], 0
    behind = {}
    for index, sequence in enumerate(sequences):
        layout = sequence.layout
        for block in range(layout.num_blocks):
            start, prefix = int(layout.prefix_end[block]), int(layout.prefix_start[block])
            count = int(layout.draft_end[block]) - start
            first = index * width + 19 + int(layout.slot_start[block])
            none = torch.zeros(32, dtype=torch.float64)
            row = hidden[index * width + start - 1] if start > prefix else none
            before = [int(sequence.tokens[max(start + i - 1, 0)]) for i in range(count)]
            slots = {i: hidden[first + i] for i in range(count)}
            for place, z in enumerate(slow_z(model, slots.get, before, row, count), 1):
                expected_z[first + place] = z
            if number in alone:
                none = model.draft_head.no_slot
                z = slow_z(model, lambda _, n=none: n, before, row, count)
                behind[number] = (model.draft_head.plain(unit(row)), z)
            number += 1
    for order, block in enumerate(alone):
        plain, z = behind[block]
        expected_hidden += [plain] * longest
        for place, own in enumerate(z, 1):
            expected_z[2 * width + order * longest + place] = own
    torch.testing.assert_close(drafts.hidden, torch.stack(expected_hidden))
    # Places that a short block lacks, of drafts of the head alone, belong to no labelled row.
    labelled = torch.cat([torch.arange(2 * width), batch.rows[-batch.alone_labels :]])
    torch.testing.assert_close(drafts.z[labelled], expected_z[labelled])
    assert (drafts.z[batch.rows[: batch.ar_labels]] == 0).all()
    assert (drafts.z[batch.blocks.slots[:, 0]] == 0).all()


@pytest.mark.parametrize("cell", DRAFT_CELLS)
def test_the_loss_of_concatenated_rows_is_that_of_whole_logits(cell):
    """Forward through the model, gradients of every parameter of the head by autograd."""
    model = make_model(cell, tie_embeddings=False).train()
    _, batch = make_inputs()
    mask = training_mask(batch.spans, torch.device("cpu"), "dense")
    objective = ObjectiveConfig()
    drafted = batch.diffusion_labels
    targets = make_targets(batch, objective, batch.ar_labels, float(drafted))
    arguments = (batch.input_ids, batch.position_ids, mask)

    def fast(hidden, weight):
        return head_loss(hidden.float(), weight.float(), targets)[0]

    model(*arguments, then=fast, blocks=batch.blocks).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    hidden = model.hidden(*arguments).flatten(0, 1)
    drafts = model.drafts(hidden, batch.blocks)
    logits = model.draft_logits(drafts, batch.rows)
    losses = F.cross_entropy(logits, batch.labels, reduction="none")
    (losses * targets.shares).sum().backward()
    head = [name for name, _ in model.named_parameters() if name.startswith("draft_head.")]
    assert {"draft_head.up.weight", "draft_head.cell.token.weight"} < set(head)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_the_ar_half_is_not_moved_by_drafts():
    """Neither the row that draws place 0 nor embeddings of drafted tokens get a gradient."""
    model = make_model("gru", tie_embeddings=False)
    _, batch = make_inputs()
    rows = 2 * batch.input_ids.shape[1]
    hidden = torch.randn(rows, 32, dtype=torch.float64, requires_grad=True)
    model.drafts(hidden, batch.blocks).z.sum().backward()
    assert model.model.embed_tokens.weight.grad is None
    clean = torch.zeros(rows, dtype=torch.bool)
    clean.view(2, -1)[:, :19] = True
    assert (hidden.grad[clean] == 0).all()
    assert (hidden.grad[batch.blocks.slots[:, 1]] != 0).any()


def test_a_new_head_changes_nothing():
    torch.manual_seed(0)
    plain = Transformer(small_config()).initialize(5)
    model = Transformer(small_config(draft_rank=4)).initialize(5)
    own = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, own[name]), name
    _, batch = make_inputs()
    hidden = torch.randn(2 * batch.input_ids.shape[1], 32)
    drafts = model.drafts(hidden, batch.blocks)
    slots = batch.blocks.slots[batch.blocks.there]
    assert torch.equal(model.draft_logits(drafts, slots), plain.lm_head(hidden[slots]))
    assert (own["draft_head.cell.slot.weight"] != 0).all()


@pytest.mark.parametrize("cell", DRAFT_CELLS)
def test_parameters_are_counted(cell):
    config = small_config(draft_rank=7, draft_cell=cell, draft_width=9)
    model = Transformer(config)
    assert sum(p.numel() for p in model.parameters()) == config.num_parameters
    wide = dataclasses.replace(config, draft_width=None)
    assert sum(p.numel() for p in Transformer(wide).parameters()) == wide.num_parameters


def test_a_head_of_a_1_5b_model_is_three_per_cent_of_it():
    config = small_config(
        "qwen2", hidden_size=1536, intermediate_size=8960, num_layers=28, num_heads=12,
        num_kv_heads=2, head_dim=128, vocab_size=151936, draft_rank=64,
    )  # fmt: skip
    assert config.num_draft_parameters < 0.03 * config.num_parameters
