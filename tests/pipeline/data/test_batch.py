"""Batches: labels, positions and rows against the rule, one token at a time."""

import dataclasses

import numpy as np
import pytest

from data_prep.formats.groups import PackedSequence
from data_prep.layout import build_layout
from pipeline.data.batch import make_batch, section_length, sequence_digest
from pipeline.model.mask import dense_mask

MASK, PAD = 99, 0


def make_sequence(rng, lengths, padding, **options) -> PackedSequence:
    total = sum(lengths)
    tokens = np.concatenate([rng.integers(1, 90, size=total), np.full(padding, PAD)])
    documents = np.array([*lengths, padding] if padding else lengths)
    layout = build_layout(lengths, 3, rng=rng, **options)
    return PackedSequence(tokens.astype(np.uint16), documents, layout, padding=padding)


@pytest.fixture
def sequences():
    rng = np.random.default_rng(0)
    return [
        make_sequence(rng, [5, 7], 0, shift=True),
        make_sequence(rng, [3, 1, 4], 4, coverage=0.5),
        make_sequence(rng, [12], 0),
    ]


def test_rows_and_labels_are_the_rule(sequences):
    slots = 12
    batch = make_batch(sequences, MASK, slots)
    width = 12 + slots
    expected_ar, expected_slots = [], []
    for number, sequence in enumerate(sequences):
        start = 0
        for length in sequence.real_lengths:
            for position in range(start, start + length - 1):
                row = number * width + position
                expected_ar.append((row, int(sequence.tokens[position + 1])))
            start += length
        slot = 0
        layout = sequence.layout
        for block in range(layout.num_blocks):
            for position in range(layout.prefix_end[block], layout.draft_end[block]):
                row = number * width + 12 + slot
                expected_slots.append((row, int(sequence.tokens[position])))
                assert batch.position_ids[number, 12 + slot] == position
                slot += 1
    pairs = list(zip(batch.rows.tolist(), batch.labels.tolist(), strict=True))
    assert pairs == expected_ar + expected_slots
    assert (batch.ar_labels, batch.diffusion_labels) == (len(expected_ar), len(expected_slots))
    assert batch.clean_tokens == 12 + 8 + 12
    assert (batch.input_ids[:, 12:] == MASK).all()
    assert batch.position_ids[:, :12].tolist() == [list(range(12))] * 3


def test_blocks_of_a_batch_one_place_at_a_time(sequences):
    """Rows, the row that draws place 0, the tokens before, and the drafts of the head alone."""
    share, slots = 0.7, 12
    batch = make_batch(sequences, MASK, slots, alone_share=share)
    width, blocks = 12 + slots, batch.blocks
    label_of = dict(zip(batch.rows.tolist(), batch.labels.tolist(), strict=True))
    number, longest, able = 0, blocks.slots.shape[1], []
    for index, sequence in enumerate(sequences):
        layout = sequence.layout
        for block in range(layout.num_blocks):
            start, prefix = layout.prefix_end[block], layout.prefix_start[block]
            ar = index * width + start - 1 if start > prefix else -1
            assert blocks.starts[number] == ar
            able += [number] if ar >= 0 else []
            for place in range(longest):
                position = start + place
                row = blocks.slots[number, place]
                if position >= layout.draft_end[block]:
                    assert row == -1
                    continue
                assert row == index * width + 12 + layout.slot_start[block] + place
                assert label_of[int(row)] == sequence.tokens[position]
                if position > prefix:
                    assert blocks.before[number, place] == sequence.tokens[position - 1]
            number += 1
    assert number == len(blocks.slots)
    alone = blocks.alone.tolist()
    assert alone == sorted(set(alone))
    assert set(alone) <= set(able), "those at a document's start have no row to begin from"
    expected = [
        (3 * width + order * longest + place, label_of[row])
        for order, block in enumerate(alone)
        for place in range(1, longest)
        if (row := int(blocks.slots[block, place])) >= 0
    ]
    behind = len(batch.rows) - batch.alone_labels
    found = list(zip(batch.rows[behind:].tolist(), batch.labels[behind:].tolist(), strict=True))
    assert found == expected
    assert batch.diffusion_labels == int(blocks.there.sum())


def test_drafts_without_slots_are_the_wanted_share_of_blocks():
    rng = np.random.default_rng(5)
    many = [make_sequence(rng, [30], 0) for _ in range(200)]
    counts = [len(make_batch([one], MASK, 30, alone_share=0.25).blocks.alone) for one in many]
    # 9 of 10 blocks have text before them: 2 or 3 of them each time, 2.25 on average.
    assert set(counts) == {2, 3}
    assert abs(np.mean(counts) - 2.25) < 5 * np.std(counts) / len(counts) ** 0.5
    assert not make_batch(many[:2], MASK, 30).alone_labels
    again = make_batch(many[1:2], MASK, 30, alone_share=0.25).blocks.alone
    beside = make_batch(many[:2], MASK, 30, alone_share=0.25).blocks.alone
    assert again.tolist() == [n - 10 for n in beside.tolist() if n >= 10], "of a sequence alone"


def test_a_prompt_is_seen_and_not_learnt():
    """Labels one position at a time: no token of a prompt is one, all behind it are as before."""
    rng, lengths, prompts = np.random.default_rng(3), [6, 5, 4], [3, 0, 4]
    tokens = rng.integers(1, 90, size=18).astype(np.uint16)
    layout = build_layout(lengths, 2, prompt_lengths=prompts)
    plain = PackedSequence(tokens, np.array([*lengths, 3]), layout, padding=3)
    with_prompts = dataclasses.replace(plain, prompt_lengths=np.array([*prompts, 0]))
    batch = make_batch([with_prompts], MASK, 18)
    expected, start = [], 0
    for length, prompt in zip(lengths, prompts, strict=True):
        predicted = range(start + max(prompt, 1), start + length)
        expected += [(position - 1, int(tokens[position])) for position in predicted]
        start += length
    ar = slice(batch.ar_labels)
    assert list(zip(batch.rows[ar].tolist(), batch.labels[ar].tolist(), strict=True)) == expected
    assert sorted(batch.position_ids[0, 18 : 18 + layout.num_slots].tolist()) == [
        3, 4, 5, 6, 7, 8, 9, 10,
    ]  # fmt: skip
    assert batch.clean_tokens == 15, "prompts are read all the same"
    mask = dense_mask(plain.document_lengths, layout)
    assert mask[18, :3].all(), "the first block behind a prompt sees it"
    assert batch.digests != make_batch([plain], MASK, 18).digests


def test_no_slots_for_the_autoregressive_twin(sequences):
    batch = make_batch(sequences, MASK, 0)
    assert batch.input_ids.shape == (3, 12)
    assert batch.diffusion_labels == 0
    with_slots = make_batch(sequences, MASK, 12)
    assert batch.labels.tolist() == with_slots.labels[: with_slots.ar_labels].tolist()
    assert batch.digests == with_slots.digests


def test_padding_carries_no_label(sequences):
    batch = make_batch(sequences[1:2], MASK, 12)
    assert PAD not in batch.labels.tolist()


def test_digest_depends_on_tokens_and_documents_not_on_types(sequences):
    sequence = sequences[0]
    wide = PackedSequence(
        sequence.tokens.astype(np.int64), sequence.document_lengths, sequence.layout
    )
    assert sequence_digest(wide) == sequence_digest(sequence)
    other = PackedSequence(sequence.tokens, np.array([6, 6]), sequence.layout)
    assert sequence_digest(other) != sequence_digest(sequence)


@pytest.mark.parametrize(
    ("length", "coverage", "block", "expected"),
    [(256, 1.0, 16, 256), (256, 0.25, 16, 64), (256, 0.3, 16, 128), (100, 0.9, 4, 100),
     (4096, 0.001, 16, 64)],
)  # fmt: skip
def test_section_length(length, coverage, block, expected):
    assert section_length(length, coverage, block) == expected
