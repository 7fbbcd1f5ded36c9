"""Documents to sequences of one length: best-fit decreasing over a window of documents, or one
document after another, cut where a sequence ends.

Best fit never cuts a document that fits into a sequence. A longer one is cut into full sequences
and a rest, which is packed like a document of its own. Source: Ding et al., *Fewer Truncations
Improve Language Modeling* (arXiv 2404.10830), who pack all documents at once; here a window bounds
the memory. Concatenation wastes nothing, but cuts a document at the end of nearly every sequence.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PACKINGS = ("best_fit", "concatenate")
WINDOW_PIECES = 8192
"""Documents and rests that are packed together. On lengths like those of web text this leaves 0.02
to 0.05 % padding, and 1,024 leave 0.1 to 0.3 %."""
Ids = NDArray[np.integer]


@dataclass(frozen=True)
class Piece:
    """A whole document, or what a cut made of one."""

    ids: Ids
    continued: bool = False
    """Whether it goes on from a cut, so that its document began in another sequence."""
    prompt: int = 0
    """How many of the ids, at the start, are a prompt's."""

    def part(self, start: int, end: int) -> "Piece":
        """The ids `start … end - 1` of it; what does not begin with it goes on from a cut."""
        ids = self.ids[start:end]
        prompt = min(max(self.prompt - start, 0), len(ids))
        return Piece(ids, self.continued or start > 0, prompt)


@dataclass
class Packed:
    """A finished sequence before it has a layout."""

    tokens: Ids
    """[S], padding at the end, in the smallest unsigned type for the vocabulary."""
    document_lengths: list[int]
    """Without the padding."""
    padding: int
    continued: list[bool]
    """Of each piece: whether it goes on from a cut."""
    prompts: list[int]
    """Of each piece: how many of its tokens, at the start, are a prompt's."""

    def pieces(self) -> list[Piece]:
        """What was packed into it."""
        ends = np.cumsum(self.document_lengths)
        parts = np.split(self.tokens[: int(ends[-1])], ends[:-1])
        rows = zip(parts, self.continued, self.prompts, strict=True)
        return [Piece(*row) for row in rows]


class Packer:
    """Packs one split; `add` documents, then `finish`; both yield the sequences that are done."""

    def __init__(
        self,
        sequence_length: int,
        pad_id: int,
        window: int = WINDOW_PIECES,
        dtype: np.dtype[np.unsignedinteger] | None = None,
    ) -> None:
        if sequence_length < 2 or window < 1:
            raise ValueError("a sequence has at least 2 tokens, and a window at least 1 piece")
        self.sequence_length = sequence_length
        self.pad_id = pad_id
        self.window = window
        self.dtype = np.dtype(np.int32) if dtype is None else dtype
        self.cut_documents = 0
        """Documents that were cut."""
        self.cut_though_fitting = 0
        """Those of them that would have fitted into a sequence."""
        self.cuts = 0
        self._pieces: list[Piece] = []

    def add(self, document: Piece) -> Iterator[Packed]:
        """Pack one document, its end token included, or what a cut left of one."""
        ids, length = document.ids, self.sequence_length
        if len(ids) > length:
            self.cut_documents += not document.continued
            self.cuts += -(-len(ids) // length) - 1
        for start in range(0, len(ids), length):
            piece = document.part(start, start + length)
            if len(piece.ids) == length:
                yield self._close([piece])
                continue
            self._pieces.append(piece)
            if len(self._pieces) == self.window:
                yield from self.finish()

    def finish(self) -> Iterator[Packed]:
        """Pack what is waiting."""
        bins = best_fit_decreasing([len(piece.ids) for piece in self._pieces], self.sequence_length)
        pieces, self._pieces = self._pieces, []
        for numbers in bins:
            yield self._close([pieces[number] for number in numbers])

    def _close(self, pieces: list[Piece]) -> Packed:
        tokens = np.full(self.sequence_length, self.pad_id, dtype=self.dtype)
        lengths = [len(piece.ids) for piece in pieces]
        filled = sum(lengths)
        np.concatenate([piece.ids for piece in pieces], out=tokens[:filled], casting="unsafe")
        marks = [piece.continued for piece in pieces]
        prompts = [piece.prompt for piece in pieces]
        return Packed(tokens, lengths, self.sequence_length - filled, marks, prompts)


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
            yield self._close(pieces)


def make_packer(
    packing: str, sequence_length: int, pad_id: int, dtype: np.dtype[np.unsignedinteger]
) -> Packer:
    """The packer of one of `PACKINGS`."""
    made = {"best_fit": Packer, "concatenate": Concatenator}[packing]
    return made(sequence_length, pad_id, dtype=dtype)


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
