"""Pack: documents to sequences of one length, best-fit decreasing over a window of documents, or
one document after another, cut where a sequence ends.

Best fit never cuts a document that fits into a sequence. A longer one is cut into full sequences
and a rest, which is packed like a document of its own. Source: Ding et al., *Fewer Truncations
Improve Language Modeling* (arXiv 2404.10830), who pack all documents at once; here a window bounds
the memory. Concatenation wastes nothing, but cuts a document at the end of nearly every sequence.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

PACKINGS = ("best_fit", "concatenate")
WINDOW_PIECES = 8192
"""Documents and rests that are packed together. On lengths like those of web text this leaves 0.02
to 0.05 % padding, and 1,024 leave 0.1 to 0.3 %."""
Ids = NDArray[np.integer]


class Piece(NamedTuple):
    """A whole document, or what a cut made of one."""

    ids: Ids
    """With the document's end token, if it ends here; a view where several are encoded at once."""
    continued: bool = False
    """Whether it goes on from a cut, so that its document began in another sequence."""
    prompt: int = 0
    """How many of the ids, at the start, are a prompt's."""

    def part(self, start: int, end: int) -> "Piece":
        """The ids `start … end - 1` of it; what does not begin with it goes on from a cut."""
        ids = self.ids[start:end]
        prompt = min(max(self.prompt - start, 0), len(ids))
        return Piece(ids, self.continued or start > 0, prompt)


Packed = list[Piece]
"""A finished sequence before it has a layout; what is missing behind its pieces is padding. Tokens
are put side by side only when they are written (`joined`)."""


def padding_of(packed: Packed, sequence_length: int) -> int:
    """Tokens that are missing behind the pieces."""
    return sequence_length - sum(len(piece.ids) for piece in packed)


def joined(
    packed: Sequence[Packed], sequence_length: int, pad_id: int, dtype: np.dtype[np.integer]
) -> Ids:
    """The tokens of n sequences, padding at the end of each, [n, S]."""
    tokens = np.empty((len(packed), sequence_length), dtype=dtype)
    paddings = [padding_of(pieces, sequence_length) for pieces in packed]
    filling = np.full(max(paddings), pad_id, dtype=dtype)
    parts = []
    for pieces, padding in zip(packed, paddings, strict=True):
        parts += [piece.ids for piece in pieces]
        if padding:
            parts.append(filling[:padding])
    np.concatenate(parts, out=tokens.reshape(-1), casting="unsafe")
    return tokens


class Packer:
    """Packs one split; `add` documents, then `finish`; both yield the sequences that are done."""

    def __init__(self, sequence_length: int, window: int = WINDOW_PIECES) -> None:
        if sequence_length < 2 or window < 1:
            raise ValueError("a sequence has at least 2 tokens, and a window at least 1 piece")
        self.sequence_length = sequence_length
        self.window = window
        self.cut_documents = 0
        """Documents that were cut."""
        self.cut_though_fitting = 0
        """Those of them that would have fitted into a sequence."""
        self.cuts = 0
        self._pieces: list[Piece] = []

    def add(self, document: Piece) -> Iterator[Packed]:
        """Pack one document, its end token included, or what a cut left of one."""
        size, length = len(document.ids), self.sequence_length
        rest = document
        if size > length:
            self.cut_documents += not document.continued
            self.cuts += -(-size // length) - 1
            full = size - size % length
            for start in range(0, full, length):
                yield [document.part(start, start + length)]
            rest = document.part(full, size)
        if len(rest.ids) == length:
            yield [rest]
        elif len(rest.ids):
            self._pieces.append(rest)
            if len(self._pieces) == self.window:
                yield from self.finish()

    def finish(self) -> Iterator[Packed]:
        """Pack what is waiting."""
        bins = best_fit_decreasing([len(piece.ids) for piece in self._pieces], self.sequence_length)
        pieces, self._pieces = self._pieces, []
        for numbers in bins:
            yield [pieces[number] for number in numbers]


class Concatenator(Packer):
    """One document after another; where a sequence ends, the document goes on in the next."""

    def add(self, document: Piece) -> Iterator[Packed]:
        ids = document.ids
        begun, fits = not document.continued, len(ids) <= self.sequence_length
        waiting = sum(len(piece.ids) for piece in self._pieces)
        start = 0
        while start < len(ids):
            end = start + min(self.sequence_length - waiting, len(ids) - start)
            self._pieces.append(document.part(start, end))
            waiting += end - start
            if end < len(ids):
                self.cuts += 1
                self.cut_documents += begun
                self.cut_though_fitting += begun and fits
                begun = False
            if waiting == self.sequence_length:
                yield from self.finish()
                waiting = 0
            start = end

    def finish(self) -> Iterator[Packed]:
        pieces, self._pieces = self._pieces, []
        if pieces:
            yield pieces


def make_packer(packing: str, sequence_length: int) -> Packer:
    """The packer of one of `PACKINGS`."""
    return {"best_fit": Packer, "concatenate": Concatenator}[packing](sequence_length)


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """Divide pieces of `lengths` among bins of `capacity`; returns the pieces' numbers by bin.

    The longest piece goes first, each to the fullest bin that has room for it; among equals the
    earlier piece, and the bin used last. O(n log n) comparisons.
    """
    bins: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys of by_room, sorted; each has at least one bin
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        fitting = bisect_left(rooms, lengths[number])
        if fitting == len(rooms):
            room, chosen = capacity, len(bins)
            bins.append([])
        else:
            room = rooms[fitting]
            chosen = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[fitting]
        bins[chosen].append(number)
        room -= lengths[number]
        if room not in by_room:
            by_room[room] = []
            insort(rooms, room)
        by_room[room].append(chosen)
    return bins
