"""Documents to sequences of one length: whole documents, best fit among a bounded set of open bins.

A document that fits into a sequence is never cut. A longer one is cut into full sequences and a
rest, which is packed like a document of its own. Memory is bounded by the open bins.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

OPEN_BINS = 512
"""Sequences that are filled side by side; more leave less padding and cost time and memory."""


@dataclass
class Packed:
    """A finished sequence before it has a layout."""

    tokens: NDArray[np.int64]
    """[S], padding at the end."""
    document_lengths: list[int]
    """Without the padding."""
    padding: int


@dataclass
class _Bin:
    room: int
    pieces: list[Sequence[int]] = field(default_factory=list)

    def add(self, piece: Sequence[int]) -> None:
        self.pieces.append(piece)
        self.room -= len(piece)


class Packer:
    """Packs one split; `add` documents, then `finish`; both yield the sequences that are done."""

    def __init__(self, sequence_length: int, pad_id: int, open_bins: int = OPEN_BINS) -> None:
        if sequence_length < 2 or open_bins < 1:
            raise ValueError("a sequence has at least 2 tokens, and at least one bin is open")
        self.sequence_length = sequence_length
        self.pad_id = pad_id
        self.open_bins = open_bins
        self.cut_documents = 0
        self.cuts = 0
        # Bins by the room they have left; a list is a stack, so the order is fully determined.
        self._by_room: dict[int, list[_Bin]] = {}
        self._open = 0

    def add(self, ids: Sequence[int]) -> Iterator[Packed]:
        """Pack one document, its end token included."""
        length = self.sequence_length
        if len(ids) > length:
            self.cut_documents += 1
            self.cuts += -(-len(ids) // length) - 1
        for start in range(0, len(ids), length):
            yield from self._place(ids[start : start + length])

    def finish(self) -> Iterator[Packed]:
        """Close all bins, the fullest first."""
        for room in sorted(self._by_room):
            while self._by_room[room]:
                yield self._close(self._by_room[room].pop())
        self._by_room.clear()
        self._open = 0

    def _place(self, piece: Sequence[int]) -> Iterator[Packed]:
        fitting = min((r for r, bins in self._by_room.items() if bins and r >= len(piece)),
                      default=None)  # fmt: skip
        if fitting is not None:
            chosen = self._by_room[fitting].pop()
            self._open -= 1
        else:
            chosen = _Bin(self.sequence_length)
        chosen.add(piece)
        if chosen.room == 0:
            yield self._close(chosen)
            return
        if self._open == self.open_bins:
            fullest = min(room for room, bins in self._by_room.items() if bins)
            yield self._close(self._by_room[fullest].pop())
            self._open -= 1
        self._by_room.setdefault(chosen.room, []).append(chosen)
        self._open += 1

    def _close(self, done: _Bin) -> Packed:
        pieces = [np.asarray(piece, dtype=np.int64) for piece in done.pieces]
        filler = np.full(done.room, self.pad_id, dtype=np.int64)
        return Packed(
            np.concatenate([*pieces, filler]), [len(piece) for piece in pieces], done.room
        )
