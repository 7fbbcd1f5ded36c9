"""Groups: the packed sequences of one sample of a shard, as arrays of all of them.

What is written and read here is described in `data_prep.formats.shards`.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

from data_prep.layout import COLUMNS, Layout

TOKENS = "tokens.npy"
MEMBERS = (TOKENS, "document_lengths.npy", "layout.npy", "continued.npy")
PROMPTS = "prompt_lengths.npy"
Arrays = dict[str, NDArray[np.unsignedinteger]]
"""The members of one sample by name, each in the smallest type that holds its values."""


@dataclass(frozen=True)
class PackedSequence:
    """Exactly `sequence_length` tokens of whole documents, and how they are laid out."""

    tokens: NDArray[np.integer]
    """[S]"""
    document_lengths: NDArray[np.integer]
    """[D], sum S; padding, if any, is a last pseudo-document that starts with the pad id."""
    layout: Layout
    continued: NDArray[np.bool_] | None = None
    """[D]: documents that go on from a cut, begun in another sequence; None is none of them."""
    prompt_lengths: NDArray[np.integer] | None = None
    """[D]: tokens at each document's start that carry no loss; None where all carry one."""

    def real_tokens(self, pad_id: int) -> int:
        """Tokens before the padding: a last document that starts with `pad_id` is padding."""
        total, last = len(self.tokens), int(self.document_lengths[-1])
        return total - last if int(self.tokens[total - last]) == pad_id else total


def group_arrays(
    tokens: NDArray[np.integer],
    document_lengths: Sequence[Sequence[int]],
    layouts: tuple[NDArray[np.integer], NDArray[np.int64]],
    continued: Sequence[Sequence[int]],
    prompt_lengths: Sequence[Sequence[int]] | None = None,
) -> Arrays:
    """The members of one sample of n sequences.

    Args:
        tokens: [n, S]
        document_lengths: of each sequence; padding, if any, is a last document.
        layouts: the layout tables one below the other, [rows, 4], and how many rows each has, [n].
        continued: of each sequence, which documents go on from a cut; those behind go on from none.
        prompt_lengths: of each sequence's documents; None where prompts are not told apart.
    """
    lengths = _filled_up(document_lengths, max(map(len, document_lengths)))
    marks = _filled_up(continued, lengths.shape[1])
    arrays = dict(zip(MEMBERS, (tokens, lengths, _tables(*layouts), marks), strict=True))
    if prompt_lengths is not None:
        arrays[PROMPTS] = _filled_up(prompt_lengths, lengths.shape[1])
    return {name: _smallest(array) for name, array in arrays.items()}


def _smallest(array: NDArray[np.integer]) -> NDArray[np.unsignedinteger]:
    """In the smallest unsigned type that holds its values."""
    return array.astype(np.min_scalar_type(int(array.max(initial=0))), copy=False)


def _filled_up(rows: Sequence[Sequence[int]], width: int) -> NDArray[np.integer]:
    """The rows with zeros behind each, [rows, width]."""
    counts = np.array([len(row) for row in rows])
    filled = np.zeros((len(rows), width), dtype=np.int32)
    filled[np.arange(width) < counts[:, None]] = [number for row in rows for number in row]
    return filled


def _tables(rows: NDArray[np.integer], counts: NDArray[np.int64]) -> NDArray[np.integer]:
    """Layout tables with rows of zeros behind each, [n, most rows, 4]."""
    kind = np.min_scalar_type(int(rows.max(initial=0)))
    filled = np.zeros((len(counts), int(counts.max()), len(COLUMNS)), dtype=kind)
    start = 0
    for table, count in zip(filled, counts.tolist(), strict=True):
        table[:count] = rows[start : start + count]
        start += count
    return filled


class PackedGroup(Sequence[PackedSequence]):
    """The sequences of one sample, each made when it is asked for: views of the group's arrays.

    Everything is checked for all sequences at once, which costs a fraction of one by one.

    Args:
        tokens: [n, S]
        lengths: document lengths, [n, D], padded with 0.
        layouts: layout tables, [n, B, 4], padded with rows of zeros.
        continued: [n, D]
        prompts: prompt lengths, [n, D]; None where all documents carry loss from their start.

    Raises:
        ValueError: when the arrays do not fit together, or a table is none of a layout.
    """

    def __init__(
        self,
        tokens: NDArray[np.integer],
        lengths: NDArray[np.integer],
        layouts: NDArray[np.integer],
        continued: NDArray[np.integer],
        prompts: NDArray[np.integer] | None = None,
    ) -> None:
        if tokens.ndim != 2 or lengths.ndim != 2:
            raise ValueError("tokens and document lengths need two dimensions")
        if layouts.ndim != 3 or layouts.shape[2] != len(COLUMNS):
            raise ValueError(f"layout tables are [n, blocks, 4], got {list(layouts.shape)}")
        if not len(tokens) == len(lengths) == len(layouts) or lengths.shape != continued.shape:
            raise ValueError("members with different numbers of sequences")
        if not (lengths.sum(1) == tokens.shape[1]).all():
            raise ValueError("document lengths that do not add up to the sequence length")
        if prompts is not None and (prompts.shape != lengths.shape or (prompts > lengths).any()):
            raise ValueError("prompts that do not fit their documents")
        self._tokens, self._lengths, self._prompts = tokens, lengths, prompts
        self._continued = continued.astype(bool)
        self._documents = _filled(lengths > 0, "document lengths")
        self._columns = np.ascontiguousarray(layouts.transpose(2, 0, 1), dtype=np.int32)
        _, starts, ends, slots = self._columns
        drafts = np.maximum(ends - starts, 0)
        real = drafts > 0
        self._blocks = _filled(real, "layout tables")
        expected = np.cumsum(drafts, axis=1, dtype=np.int32) - drafts
        if not ((slots == expected) | ~real).all():
            raise ValueError("the layout table's slot_start column is not the running slot count")

    def __len__(self) -> int:
        return len(self._tokens)

    @overload
    def __getitem__(self, row: int) -> PackedSequence: ...

    @overload
    def __getitem__(self, row: slice) -> list[PackedSequence]: ...

    def __getitem__(self, row: int | slice) -> PackedSequence | list[PackedSequence]:
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        documents, blocks = self._documents[row], self._blocks[row]
        columns = self._columns
        layout = Layout(
            columns[0, row, :blocks],
            columns[1, row, :blocks],
            columns[2, row, :blocks],
            columns[3, row, :blocks],
        )
        prompts = None if self._prompts is None else self._prompts[row, :documents]
        return PackedSequence(
            self._tokens[row],
            self._lengths[row, :documents],
            layout,
            self._continued[row, :documents],
            prompts,
        )


def decode_group(sample: Mapping[str, bytes]) -> PackedGroup:
    """The sequences of one sample, its members as bytes.

    Raises:
        ValueError: when members are missing, damaged, or do not fit together.
    """
    missing = [name for name in MEMBERS if name not in sample]
    if missing:
        raise ValueError(f"members missing: {', '.join(missing)}")
    tokens, lengths, layouts, continued = (npy_array(sample[name]) for name in MEMBERS)
    prompts = npy_array(sample[PROMPTS]) if PROMPTS in sample else None
    return PackedGroup(tokens, lengths, layouts, continued, prompts)


def npy_array(content: bytes) -> NDArray[np.integer]:
    """The array of whole numbers in a `.npy` file.

    Raises:
        ValueError: when it is no such file, or holds something else.
    """
    try:
        array = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except ValueError:
        raise
    except Exception as error:  # what numpy's parser of a damaged header runs into
        raise ValueError(f"no array can be read ({error})") from error
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"an array of {array.dtype}, which no shard has")
    return array


def _filled(real: NDArray[np.bool_], what: str) -> list[int]:
    """How many values of each row are real, which must stand before those that fill it up, [n]."""
    counts = real.sum(1)
    if not (real == (np.arange(real.shape[1]) < counts[:, None])).all():
        raise ValueError(f"{what} with zeros between others")
    return counts.tolist()
