"""Any documents, any layout: the rules that every table has to keep, and how blocks are drawn."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.layout import Layout, build_layout, scatter_blocks

QUICK = settings(deadline=None, derandomize=True, database=None, max_examples=150)


@st.composite
def documents(draw):
    """Lengths of some documents, and of the prompt that each begins with."""
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=12))
    prompts = [draw(st.integers(0, n)) if draw(st.booleans()) else 0 for n in lengths]
    return lengths, prompts


LAYOUTS = {
    "block_size": st.integers(1, 17),
    "coverage": st.floats(0.02, 1.0),
    "shift": st.booleans(),
    "seed": st.integers(0, 2**32 - 1),
}


def laid_out(given_documents, block_size, coverage, shift, seed) -> Layout:
    lengths, prompts = given_documents
    rng = np.random.default_rng(seed)
    return build_layout(
        lengths, block_size, coverage=coverage, shift=shift, rng=rng, prompt_lengths=prompts
    )


def open_positions(lengths, prompts):
    """Document start of every position that may be drafted, by position."""
    found, start = {}, 0
    for length, prompt in zip(lengths, prompts, strict=True):
        found |= dict.fromkeys(range(start + prompt, start + length), start)
        start += length
    return found


@QUICK
@given(given_documents=documents(), **LAYOUTS)
def test_blocks_keep_the_rules(given_documents, block_size, coverage, shift, seed):
    layout = laid_out(given_documents, block_size, coverage, shift, seed)
    allowed = open_positions(*given_documents)
    drafted = []
    for prefix_start, prefix_end, draft_end, _ in layout.table().tolist():
        assert 1 <= draft_end - prefix_end <= block_size
        positions = list(range(prefix_end, draft_end))
        assert {allowed.get(position) for position in positions} == {prefix_start}, (
            "a block drafts positions of one document, behind its prompt, and sees its start on"
        )
        drafted += positions
    assert drafted == sorted(set(drafted)), "in order, no position twice"
    assert layout.slot_position.tolist() == drafted
    assert layout.slot_start.tolist() == (np.cumsum(layout.draft_lengths) - layout.draft_lengths
                                          ).tolist()  # fmt: skip
    if coverage == 1.0:
        assert drafted == sorted(allowed)
    elif allowed:
        assert len(drafted) >= 1
        assert len(drafted) <= coverage * len(allowed) or layout.num_blocks == 1
    assert np.array_equal(Layout.from_table(layout.table()).table(), layout.table())


@QUICK
@given(given_documents=documents(), **LAYOUTS)
def test_the_same_numbers_give_the_same_layout(given_documents, **choice):
    one, two = (laid_out(given_documents, **choice) for _ in range(2))
    assert np.array_equal(one.table(), two.table())


def placements(length, block_size, count):
    """Every way to start `count` blocks in a span so that none overlaps another."""
    return [
        starts
        for starts in combinations(range(length), count)
        if all(b - a >= block_size for a, b in pairwise(starts))
    ]


@pytest.mark.parametrize(("length", "block_size", "count"), [(9, 3, 1), (9, 3, 2), (7, 2, 3)])
def test_places_of_blocks_are_equally_likely(length, block_size, count):
    """Against a list of all of them, made by trying."""
    seen = dict.fromkeys(placements(length, block_size, count), 0)
    mean = np.mean([min(block_size, length - start) for start in range(length)])
    rng, span = np.random.default_rng(0), (np.array([0]), np.array([length]))
    for _ in range(200 * len(seen)):
        _, starts, ends = scatter_blocks(*span, block_size, (count - 0.5) * mean / length, rng)
        assert ends.tolist() == [min(start + block_size, length) for start in starts]
        seen[tuple(starts.tolist())] += 1
    counts = np.array(list(seen.values()))
    assert abs(counts - 200).max() < 5 * np.sqrt(200)


def test_every_position_starts_a_block_on_no_grid():
    """Long and short documents alike, at the share that was asked for."""
    lengths, block_size, coverage = [300, 20, 5, 75, 1], 8, 0.25
    starts, drafted, differ = np.zeros(sum(lengths)), 0, 0
    for seed in range(600):
        rng = np.random.default_rng(seed)
        layout = build_layout(lengths, block_size, coverage=coverage, shift=True, rng=rng)
        starts[layout.prefix_end] += 1
        drafted += layout.num_slots
        differ += len(set(layout.prefix_end[layout.prefix_end < 300] % block_size)) > 2
    assert differ > 590, "the blocks of one document share no grid"
    assert 0.95 * coverage < drafted / (600 * sum(lengths)) <= coverage
    mean = starts.mean()
    assert abs(starts - mean).max() < 5 * np.sqrt(mean)
