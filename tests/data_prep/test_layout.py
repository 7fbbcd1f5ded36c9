"""The layout table against a loop that follows its definition, and its errors."""

import numpy as np
import pytest

from data_prep.layout import COLUMNS, Layout, build_layout

LENGTHS = [[1], [7], [8], [9], [7, 5], [1, 1, 1], [3, 24, 8, 1, 29], [128]]


def rows_by_loop(lengths, block_size, firsts=None):
    """Every block of full coverage, one position at a time; `firsts`: length of first blocks."""
    rows, start, slot = [], 0, 0
    for number, length in enumerate(lengths):
        block_start, room = start, firsts[number] if firsts else block_size
        for position in range(start, start + length):
            if position - block_start == room:
                rows.append((start, block_start, position, slot + block_start))
                block_start, room = position, block_size
        rows.append((start, block_start, start + length, slot + block_start))
        start += length
    return rows


@pytest.mark.parametrize("block_size", [1, 3, 8, 200])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_the_aligned_grid_equals_the_loop(lengths, block_size):
    layout = build_layout(lengths, block_size)
    assert layout.table().tolist() == [list(row) for row in rows_by_loop(lengths, block_size)]
    assert layout.num_slots == sum(lengths)
    assert layout.slot_position.tolist() == list(range(sum(lengths)))


@pytest.mark.parametrize("lengths", LENGTHS)
def test_a_shifted_grid_equals_the_loop_with_its_first_blocks(lengths):
    seen = set()
    for seed in range(20):
        layout = build_layout(lengths, 4, shift=True, rng=np.random.default_rng(seed))
        first_rows = layout.prefix_start == layout.prefix_end
        firsts = layout.draft_lengths[first_rows].tolist()
        assert len(firsts) == len(lengths)
        # The first block of a document shorter than the drawn first block ends with the document.
        loop = rows_by_loop(lengths, 4, firsts)
        assert layout.table().tolist() == [list(row) for row in loop]
        seen.update(firsts)
    if max(lengths) >= 4:
        assert seen == {1, 2, 3, 4}, "every shift must come up"


def test_a_last_block_is_short():
    layout = build_layout([7, 5], 4)
    assert layout.draft_lengths.tolist() == [4, 3, 4, 1]


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("coverage", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_partial_coverage_keeps_blocks_of_the_grid_within_the_budget(lengths, coverage, drawn):
    block_size, total = 4, sum(lengths)
    grid = {row[:3] for row in rows_by_loop(lengths, block_size)}
    for seed in range(5):
        rng = np.random.default_rng(seed) if drawn else None
        layout = build_layout(lengths, block_size, coverage=coverage, rng=rng)
        rows = [tuple(row) for row in layout.table().tolist()]
        assert rows == sorted(rows)
        assert {row[:3] for row in rows} <= grid
        assert layout.num_blocks >= 1
        assert layout.num_slots <= max(coverage * total, block_size)
        if layout.num_blocks > 1:
            assert layout.num_slots <= coverage * total
        slots = np.cumsum(layout.draft_lengths) - layout.draft_lengths
        assert layout.slot_start.tolist() == slots.tolist()


def test_drawn_blocks_use_the_budget_and_reach_every_block():
    chosen = set()
    for seed in range(60):
        layout = build_layout([400], 8, coverage=0.25, rng=np.random.default_rng(seed))
        assert layout.num_slots > 0.25 * 400 - 8
        chosen.update(layout.prefix_end.tolist())
    assert chosen == set(range(0, 400, 8))


@pytest.mark.parametrize("shift", [False, True])
def test_every_position_is_drafted_as_often_as_any_other(shift):
    """Away from the ends, where blocks of a moving grid may be cut."""
    seeds, coverage, size = 2000, 0.25, 4
    drafted = np.zeros(64)
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        layout = build_layout([64], size, coverage=coverage, shift=shift, rng=rng)
        drafted[layout.slot_position] += 1
    inner = drafted[size:-size]
    mean = inner.mean()
    assert mean == pytest.approx(seeds * coverage, rel=0.1)
    assert np.abs(inner - mean).max() < 5 * mean**0.5


def test_scattered_blocks_fall_into_every_document_by_its_length():
    """One block or two at a time: which documents get them is drawn anew by each seed."""
    lengths, seeds = [20, 20, 40], 2000
    counts = np.zeros(3)
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        layout = build_layout(lengths, 4, coverage=0.06, shift=True, rng=rng)
        counts += np.bincount(np.searchsorted([20, 40], layout.prefix_end, "right"), minlength=3)
    expected = counts.sum() * np.array([0.25, 0.25, 0.5])
    assert (np.abs(counts - expected) < 5 * expected**0.5).all()


def test_slot_positions_run_through_each_block():
    layout = build_layout([9, 6], 4, coverage=0.6, rng=np.random.default_rng(3))
    expected = [
        position
        for start, end in zip(layout.prefix_end, layout.draft_end, strict=True)
        for position in range(start, end)
    ]
    assert layout.slot_position.tolist() == expected
    assert len(layout.slot_block) == layout.num_slots


@pytest.mark.parametrize("lengths", LENGTHS)
def test_a_table_survives_padding_and_small_types(lengths):
    layout = build_layout(lengths, 4, shift=True, rng=np.random.default_rng(0))
    padded = np.zeros((layout.num_blocks + 3, len(COLUMNS)), dtype=np.uint8)
    padded[: layout.num_blocks] = layout.table()
    again = Layout.from_table(padded)
    for name in COLUMNS:
        assert getattr(again, name).dtype == np.int32
        assert np.array_equal(getattr(again, name), getattr(layout, name))


def test_no_documents_give_no_blocks():
    assert build_layout([], 4).num_blocks == 0
    assert Layout.from_table(np.zeros((2, 4))).num_slots == 0


@pytest.mark.parametrize(
    ("arguments", "keywords", "text"),
    [
        (([3, 0], 4), {}, "at least 1, got 0"),
        (([3], 0), {}, "block_size must be at least 1, got 0"),
        (([3], 4), {"coverage": 0.0}, r"coverage must be in \(0, 1\]"),
        (([3], 4), {"coverage": 1.5}, r"coverage must be in \(0, 1\]"),
        (([3], 4), {"shift": True}, "needs rng"),
    ],
)
def test_bad_arguments_are_named(arguments, keywords, text):
    with pytest.raises(ValueError, match=text):
        build_layout(*arguments, **keywords)


def test_bad_tables_are_refused():
    with pytest.raises(ValueError, match=r"got shape \[2, 3\]"):
        Layout.from_table(np.ones((2, 3)))
    with pytest.raises(ValueError, match="running slot count"):
        Layout.from_table([[0, 0, 4, 0], [0, 4, 8, 5]])
