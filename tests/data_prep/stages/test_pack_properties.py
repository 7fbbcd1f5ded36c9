"""Any documents, both packings: every token in exactly one place, and no sum that does not fit."""

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.formats.groups import PackedGroup, group_arrays
from data_prep.layout import aligned_tables, build_layout
from data_prep.stages.pack import (
    PACKINGS,
    Piece,
    best_fit_decreasing,
    joined,
    make_packer,
    padding_of,
)
from data_prep.stages.write import stored_lengths

QUICK = settings(deadline=None, derandomize=True, database=None, max_examples=150)
PAD = 0
LENGTHS = st.lists(st.integers(1, 70), max_size=40)


def documents_of(lengths):
    """Their tokens are numbered through, so that none is like another or like the padding."""
    ends = np.cumsum([0, *lengths])
    return [np.arange(1 + a, 1 + b) for a, b in pairwise(ends)]


def packed(lengths, length, packing, window):
    packer = make_packer(packing, length)
    packer.window = window
    documents = documents_of(lengths)
    done = [one for document in documents for one in packer.add(Piece(document))]
    return [*done, *packer.finish()], packer


@QUICK
@given(
    lengths=LENGTHS, length=st.integers(2, 32), packing=st.sampled_from(PACKINGS),
    window=st.integers(1, 50),
)  # fmt: skip
def test_every_token_stands_in_exactly_one_place(lengths, length, packing, window):
    sequences, packer = packed(lengths, length, packing, window)
    firsts = set((np.cumsum([0, *lengths[:-1]]) + 1).tolist()) if lengths else set()
    found = []
    for one in sequences:
        tokens = joined([one], length, PAD, np.dtype(np.uint16))[0]
        padding = padding_of(one, length)
        assert padding >= 0
        assert tokens.tolist()[: length - padding] == [n for p in one for n in p.ids]
        assert (tokens[length - padding :] == PAD).all()
        for piece in one:
            ids = piece.ids.tolist()
            assert 1 <= len(ids) <= length
            assert ids == list(range(ids[0], ids[0] + len(ids))), "in order, of one document"
            assert not firsts & set(ids[1:]), "no document begins inside a piece"
            assert piece.continued == (ids[0] not in firsts)
            found.append(ids)
    assert sorted(token for ids in found for token in ids) == list(range(1, sum(lengths) + 1))
    assert packer.cuts == len(found) - len(lengths)
    cut = sum(n > length for n in lengths)
    assert packer.cut_documents - packer.cut_though_fitting == cut
    if packing == "best_fit":
        assert packer.cut_though_fitting == 0
    elif sequences:
        assert sum(padding_of(one, length) for one in sequences[:-1]) == 0


@QUICK
@given(lengths=LENGTHS, length=st.integers(2, 32), block_size=st.integers(1, 9))
def test_what_is_stored_fits_together(lengths, length, block_size):
    """Padding becomes a last document without a block; lengths add up."""
    sequences = packed(lengths, length, "best_fit", 50)[0]
    if not sequences:
        return
    kind = np.dtype(np.uint16)
    arrays = group_arrays(
        joined(sequences, length, PAD, kind),
        [stored_lengths(one, length) for one in sequences],
        aligned_tables([[len(piece.ids) for piece in one] for one in sequences], block_size),
        [[piece.continued for piece in one] for one in sequences],
    )
    for sequence, one in zip(PackedGroup(*arrays.values()), sequences, strict=True):
        assert int(sequence.document_lengths.sum()) == length
        assert sequence.real_tokens(PAD) == length - padding_of(one, length)
        assert sequence.real_tokens(PAD) == sequence.layout.num_slots
        alone = build_layout([len(piece.ids) for piece in one], block_size)
        assert np.array_equal(sequence.layout.table(), alone.table())


@QUICK
@given(lengths=st.lists(st.integers(1, 30), max_size=60), spare=st.integers(0, 20))
def test_bins_hold_every_piece_once_and_no_more_than_fits(lengths, spare):
    capacity = max(lengths, default=1) + spare
    bins = best_fit_decreasing(lengths, capacity)
    assert sorted(number for own in bins for number in own) == list(range(len(lengths)))
    fills = [sum(lengths[number] for number in own) for own in bins]
    assert all(0 < fill <= capacity for fill in fills)
    # Two bins that fit into one would mean that a piece opened a bin without need.
    assert all(a + b > capacity for n, a in enumerate(fills) for b in fills[:n])
