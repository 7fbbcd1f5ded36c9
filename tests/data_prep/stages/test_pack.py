"""Packing keeps every token once and in order, cuts only what does not fit, and wastes little."""

from itertools import pairwise

import numpy as np
import pytest

from data_prep.stages.pack import Packer, Piece, best_fit_decreasing, joined, padding_of

PAD = 0


def pack(documents, length, window=8192):
    packer = Packer(length, window)
    done = [one for document in documents for one in packer.add(Piece(document))]
    return [*done, *packer.finish()], packer


def numbered(lengths):
    """Documents of these lengths whose tokens are all different and never the padding."""
    ends = np.cumsum(lengths)
    return [
        np.arange(end - n + 1, end + 1, dtype=np.int32)
        for n, end in zip(lengths, ends, strict=True)
    ]


def lengths_of(packed):
    return [len(piece.ids) for piece in packed]


def pieces_of(packed, length):
    starts = np.cumsum([0, *lengths_of(packed)])
    return [tokens_of(packed, length)[a:b] for a, b in pairwise(starts)]


def tokens_of(packed, length):
    return joined([packed], length, PAD, np.dtype(np.int32))[0]


@pytest.mark.parametrize("window", [1, 20, 8192])
@pytest.mark.parametrize("seed", range(8))
def test_every_token_stands_once_and_in_order(seed, window):
    rng = np.random.default_rng(seed)
    length = int(rng.integers(2, 65))
    lengths = rng.integers(1, rng.integers(2, 4 * length), size=150).tolist()
    documents = numbered(lengths)
    sequences, packer = pack(documents, length, window)

    pieces = []
    for packed in sequences:
        padding = padding_of(packed, length)
        assert padding >= 0
        assert min(lengths_of(packed)) >= 1
        assert (tokens_of(packed, length)[length - padding :] == PAD).all()
        pieces += pieces_of(packed, length)
    # Tokens are numbered through all documents: the pieces, sorted, must be the documents, cut at
    # multiples of the length and nowhere else.
    pieces.sort(key=lambda piece: piece[0])
    expected = [
        document[start : start + length]
        for document in documents
        for start in range(0, len(document), length)
    ]
    assert [piece.tolist() for piece in pieces] == [piece.tolist() for piece in expected]
    assert packer.cut_documents == sum(n > length for n in lengths)
    assert packer.cuts == len(expected) - len(documents)


def best_fit_by_search(lengths, capacity):
    """The rule of best-fit decreasing written out: every bin is looked at for every piece."""
    bins = []
    for length in sorted(lengths, reverse=True):
        fitting = [one for one in bins if sum(one) + length <= capacity]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            bins.append([length])
    return sorted(map(sorted, bins))


@pytest.mark.parametrize("seed", range(10))
def test_bins_equal_those_of_a_plain_search(seed):
    lengths = np.random.default_rng(seed).integers(1, 50, size=80).tolist()
    bins = best_fit_decreasing(lengths, 50)
    assert sorted(n for numbers in bins for n in numbers) == list(range(len(lengths)))
    fills = sorted(sorted(lengths[n] for n in numbers) for numbers in bins)
    plain = best_fit_by_search(lengths, 50)
    # Among bins that are equally full any may be taken, so what is compared is how full they are.
    assert sorted(map(sum, fills)) == sorted(map(sum, plain))


def test_the_longest_go_first_each_where_it_fits_best():
    assert best_fit_decreasing([4, 7, 5, 3, 5], 10) == [[1, 3], [2, 4], [0]]


def test_a_window_bounds_what_waits():
    packer = Packer(10, window=3)
    first, second, third, fourth = numbered([6, 3, 4, 9])
    assert [*packer.add(Piece(first)), *packer.add(Piece(second))] == []
    assert [lengths_of(packed) for packed in packer.add(Piece(third))] == [[6, 4], [3]]
    assert list(packer.add(Piece(fourth))) == []
    assert [lengths_of(packed) for packed in packer.finish()] == [[9]]
    assert list(packer.finish()) == []


def test_packing_is_deterministic():
    lengths = np.random.default_rng(1).integers(1, 200, size=300).tolist()
    first, second = (pack(numbered(lengths), 64)[0] for _ in range(2))
    assert list(map(lengths_of, first)) == list(map(lengths_of, second))
    tokens = [joined(made, 64, PAD, np.dtype(np.int32)) for made in (first, second)]
    assert np.array_equal(*tokens)
    assert tokens[0].shape == (len(first), 64)
    assert all(
        np.array_equal(row, tokens_of(one, 64)) for row, one in zip(tokens[0], first, strict=True)
    )


def test_realistic_lengths_leave_little_padding():
    """Lognormal lengths with a median of 500 tokens, as web text has."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(500), 1.1, size=12_000), 10, 60_000).astype(int)
    sequences, packer = pack([np.ones(n, dtype=np.int32) for n in lengths], 2048)
    padding = sum(padding_of(packed, 2048) for packed in sequences)
    assert padding / (len(sequences) * 2048) < 0.001
    assert packer.cut_documents == (lengths > 2048).sum()


def test_a_document_of_exactly_one_sequence_is_not_cut():
    sequences, packer = pack(numbered([16]), 16)
    assert packer.cuts == 0
    assert padding_of(sequences[0], 16) == 0


def test_nothing_gives_nothing():
    assert pack([], 16)[0] == []


@pytest.mark.parametrize("arguments", [(1,), (16, 0)])
def test_bad_sizes_are_refused(arguments):
    with pytest.raises(ValueError, match="at least"):
        Packer(*arguments)


def test_a_document_that_was_cut_before_is_not_counted_as_cut_once_more():
    packer = Packer(8)
    assert len(list(packer.add(Piece(np.arange(20), continued=True)))) == 2
    assert (packer.cut_documents, packer.cuts) == (0, 2)
    assert len(list(packer.add(Piece(np.arange(20))))) == 2
    assert (packer.cut_documents, packer.cuts) == (1, 4)
