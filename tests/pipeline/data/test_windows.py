"""Linear drafting: where windows lie, and what a batch makes of them, one place at a time."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import chisquare

from data_prep.formats.groups import PackedSequence
from data_prep.formats.manifest import Manifest
from data_prep.layout import Layout, build_layout
from pipeline.data.batch import make_batch, section_length
from pipeline.data.source import LayoutChoice, SequenceSource
from pipeline.data.windows import draw_windows, stale_layout

K, MASK, LENGTH = 4, 99, 24
SLOTS = 2 * K - 1


def blocks_of_lengths(lengths: list[int]) -> Layout:
    """Each in a document of its own, behind three tokens."""
    ends = np.cumsum(np.array(lengths) + 3)
    starts = ends - lengths
    slots = np.cumsum(lengths) - lengths
    return Layout.from_table(np.stack([starts - 3, starts, ends, slots], axis=1))


@pytest.mark.parametrize("length", range(1, SLOTS + 1))
def test_first_places_follow_the_geometric_law_of_those_that_leave_a_draft(length):
    layout = blocks_of_lengths([length] * 4000)
    start, end = draw_windows(layout, K, np.random.default_rng(length))
    first = start - layout.prefix_end
    possible = [m for m in range(K) if m == 0 or m + 1 < length]
    chance = np.array([0.4 * 0.6**m for m in possible])
    found = np.bincount(first, minlength=len(possible))
    assert len(found) == len(possible)
    assert len(found) == 1 or chisquare(found, 4000 * chance / chance.sum()).pvalue > 1e-3
    assert np.array_equal(end, np.minimum(start + K, layout.draft_end))
    assert (end - start >= min(length, 2)).all()


def make_sequences() -> list[PackedSequence]:
    """Blocks at documents' starts, short ones, padding, some left out."""
    rng, made = np.random.default_rng(1), []
    for lengths, padding, coverage in (([LENGTH], 0, 1.0), ([9, 1, 11], 3, 1.0), ([5, 19], 0, 0.6)):
        layout = build_layout(lengths, SLOTS, shift=True, coverage=coverage, rng=rng)
        documents = np.array([*lengths, padding] if padding else lengths)
        tokens = rng.integers(1, 90, size=LENGTH)
        windows = draw_windows(layout, K, rng)
        made.append(PackedSequence(tokens, documents, layout, padding=padding, windows=windows))
    # One window of nothing, and one that begins behind its document's first token.
    first, start = made[0], made[0].layout.prefix_end
    windows = np.stack([start + 1, np.minimum(start + 1 + K, first.layout.draft_end)])
    windows[1, 1] = windows[0, 1]
    made[0] = PackedSequence(first.tokens, first.document_lengths, first.layout, windows=windows)
    return made


def test_windows_of_a_batch_one_place_at_a_time():
    sequences = make_sequences()
    batch = make_batch(sequences, MASK, LENGTH, alone_share=1.0)
    blocks, width, number = batch.blocks, 2 * LENGTH, 0
    expected, alone, behind_nothing = [], [], 0
    for index, sequence in enumerate(sequences):
        layout = sequence.layout
        for block in range(layout.num_blocks):
            start, end = sequence.windows[:, block]
            for place in range(blocks.slots.shape[1]):
                position, row = start + place, int(blocks.slots[number, place])
                if position >= end:
                    assert row == -1
                    continue
                slot = layout.slot_start[block] + position - layout.prefix_end[block]
                assert row == index * width + LENGTH + slot
                assert batch.position_ids.flatten()[row] == position
                expected.append((row, int(sequence.tokens[position])))
                if position > layout.prefix_start[block]:
                    assert blocks.before[number, place] == sequence.tokens[position - 1]
            begun = start > layout.prefix_start[block] and end > start
            assert blocks.starts[number] == (index * width + start - 1 if begun else -1)
            alone += [number] if begun else []
            behind_nothing += layout.prefix_end[block] == layout.prefix_start[block] and begun
            number += 1
    assert number == len(blocks.slots)
    assert blocks.slots.shape[1] == K
    assert behind_nothing, "a later window of a document's first block has a row to begin from"
    slots = slice(batch.ar_labels, len(batch.rows) - batch.alone_labels)
    found = list(zip(batch.rows[slots].tolist(), batch.labels[slots].tolist(), strict=True))
    assert found == expected
    assert blocks.alone.tolist() == alone
    assert batch.slots == sum(s.layout.num_slots for s in sequences) > batch.diffusion_labels


def test_windows_change_neither_the_clean_section_nor_who_sees_whom():
    sequences = make_sequences()
    batch = make_batch(sequences, MASK, LENGTH)
    whole = make_batch(
        [replace(s, windows=None) for s in sequences],
        MASK, LENGTH,
    )  # fmt: skip
    for name in ("lower", "upper", "block"):
        assert getattr(batch.spans, name).equal(getattr(whole.spans, name))
    assert batch.input_ids.equal(whole.input_ids)
    assert batch.attention_pairs == whole.attention_pairs
    ar = slice(batch.ar_labels)
    assert batch.rows[ar].equal(whole.rows[ar])
    without = make_batch(sequences, MASK, 0)
    assert without.labels.equal(batch.labels[ar])
    assert without.slots == without.diffusion_labels == 0


@pytest.mark.parametrize("first", range(K))
@pytest.mark.parametrize("shift", [False, True])
def test_scored_windows_meet_each_position_once(first, shift):
    lengths = np.array([13, 1, 3, 7])
    rng = np.random.default_rng(3)
    layout = build_layout(lengths, K, shift=shift, rng=rng)
    longer, windows = stale_layout(layout, lengths.astype(np.uint32), K, first)
    assert windows.dtype == np.int64
    assert np.array_equal(Layout.from_table(longer.table()).slot_position, longer.slot_position)
    met = []
    for block in range(layout.num_blocks):
        start = int(layout.prefix_end[block])
        document_end = min(int(end) for end in np.cumsum(lengths) if end > start)
        assert longer.prefix_end[block] == start
        assert longer.draft_end[block] == min(start + SLOTS, document_end)
        at_start = start == layout.prefix_start[block]
        wanted = [
            position + first
            for position in range(start, int(layout.draft_end[block]))
            if position + first < document_end and not (first and at_start)
        ]
        assert list(range(*windows[:, block])) == wanted
        assert not wanted or wanted[-1] < longer.draft_end[block]
        met += wanted
    assert len(set(met)) == len(met)
    if first == 0:
        assert np.array_equal(windows, layout.drafted)
    with pytest.raises(ValueError, match=r"first must be a place in 0 … 3, got 4"):
        stale_layout(layout, lengths, K, 4)


def test_a_run_draws_windows_by_seed_epoch_and_sequence_alone(data_dir):
    manifest = Manifest.load(data_dir)
    choice = LayoutChoice(block_size=K, linear=True, coverage=0.5)
    source, again = (
        SequenceSource(data_dir, manifest, manifest.train, 0, choice, sequences_per_step=size)
        for size in (1, 8)
    )
    assert (source.block_size, source.block_slots) == (K, SLOTS)
    epoch = source.order.epoch_sequences
    by_tokens: list[dict] = [{}, {}]
    for n in range(2 * epoch):
        sequence = source[n]
        assert n > 50 or np.array_equal(sequence.windows, again[n].windows)
        start, end = sequence.windows
        layout = sequence.layout
        assert layout.draft_lengths.max() <= SLOTS
        assert (end - start).max() <= K
        assert (start >= layout.prefix_end).all()
        assert (end <= layout.draft_end).all()
        assert layout.num_slots <= section_length(manifest.sequence_length, 0.5, SLOTS)
        real = int(sequence.real_lengths.sum())
        assert layout.num_slots <= 0.5 * real or layout.num_blocks == 1
        by_tokens[n // epoch][sequence.tokens.tobytes()] = sequence
    differ = [
        not np.array_equal(one.windows, by_tokens[1][key].windows)
        for key, one in by_tokens[0].items()
    ]
    assert np.mean(differ) > 0.9
    # A batch is its sequences, whatever stands beside them.
    slots = section_length(manifest.sequence_length, 0.5, SLOTS)
    sequences = [source[n] for n in range(4)]
    whole = make_batch(sequences, MASK, slots, alone_share=0.5)
    parts = [make_batch([one], MASK, slots, alone_share=0.5) for one in sequences]
    assert whole.diffusion_labels == sum(part.diffusion_labels for part in parts)
    assert whole.labels[: whole.ar_labels].tolist() == [
        label for part in parts for label in part.labels[: part.ar_labels].tolist()
    ]
    assert whole.blocks.before.tolist() == [
        row for part in parts for row in part.blocks.before.tolist()
    ]


def test_block_sizes_of_a_mix_have_windows_of_their_own(data_dir):
    manifest = Manifest.load(data_dir)
    choice = LayoutChoice(block_size=8, block_sizes=[2, 8], linear=True)
    source = SequenceSource(data_dir, manifest, manifest.train, 0, choice)
    found = {
        (int(s.layout.draft_lengths.max()), int((s.windows[1] - s.windows[0]).max()))
        for s in map(source.__getitem__, range(60))
    }
    assert found == {(3, 2), (15, 8)}
