"""The layout table of a packed sequence: which blocks are drafted, from what prefix, in what slots.

One row per diffusion block, in the columns of `COLUMNS`:

- `prefix_start`, `prefix_end`: the clean span `[prefix_start, prefix_end)` a block conditions on,
  from its document's start up to the block's first position;
- `draft_end`: the block drafts, and is scored on, positions `prefix_end … draft_end - 1`;
- `slot_start`: where its mask slots stand in the mask section.

Attention, position ids, labels and loss weights all follow from the tokens, the document lengths
and this table, so one trainer serves every layout. numpy only. Source: TiDAR (arXiv 2511.08923),
section 3.1, for the aligned full-coverage layout; the shifted grid and partial coverage are ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

COLUMNS = ("prefix_start", "prefix_end", "draft_end", "slot_start")
Int32Array = NDArray[np.int32]


@dataclass(frozen=True)
class Layout:
    """The diffusion blocks of one packed sequence; four int32 arrays of shape [blocks]."""

    prefix_start: Int32Array
    prefix_end: Int32Array
    draft_end: Int32Array
    slot_start: Int32Array

    @property
    def num_blocks(self) -> int:
        return len(self.prefix_start)

    @property
    def draft_lengths(self) -> Int32Array:
        """Positions drafted by each block, [blocks]; at least 1, at most the block size."""
        return self.draft_end - self.prefix_end

    @property
    def num_slots(self) -> int:
        """Length of the mask section before padding."""
        return int(self.draft_lengths.sum())

    @property
    def slot_block(self) -> Int32Array:
        """The block that each mask slot belongs to, [num_slots]."""
        return np.repeat(np.arange(self.num_blocks, dtype=np.int32), self.draft_lengths)

    @property
    def slot_position(self) -> Int32Array:
        """The position that each mask slot predicts, [num_slots]."""
        offset = np.arange(self.num_slots, dtype=np.int32) - self.slot_start[self.slot_block]
        return self.prefix_end[self.slot_block] + offset

    def table(self) -> Int32Array:
        """The int32 table [blocks, 4] in the order of `COLUMNS`, as shards store it."""
        return np.stack([getattr(self, name) for name in COLUMNS], axis=1)

    @classmethod
    def from_table(cls, table: ArrayLike) -> "Layout":
        """Read a table [rows, 4]; rows of zeros, with which shards pad, are left out.

        Raises:
            ValueError: when the table has another width or its slots are not one after another.
        """
        rows = np.asarray(table, dtype=np.int32)
        if rows.ndim != 2 or rows.shape[1] != len(COLUMNS):
            raise ValueError(f"a layout table is [blocks, 4], got shape {list(rows.shape)}")
        rows = rows[rows[:, 2] > rows[:, 1]]
        layout = cls(*(np.ascontiguousarray(column) for column in rows.T))
        ends = np.cumsum(layout.draft_lengths, dtype=np.int32)
        if not np.array_equal(layout.slot_start, ends - layout.draft_lengths):
            raise ValueError("the layout table's slot_start column is not the running slot count")
        return layout


def build_layout(
    document_lengths: Sequence[int] | NDArray[np.integer],
    block_size: int,
    *,
    coverage: float = 1.0,
    shift: bool = False,
    rng: np.random.Generator | None = None,
) -> Layout:
    """Lay a grid of blocks of `block_size` positions over every document.

    Args:
        document_lengths: tokens of each document, in order, [documents]. Leave the padding out:
            what has no length here gets no block.
        block_size: K, the most positions a block drafts. A document's last block may be shorter.
        coverage: share of the positions that are drafted, in (0, 1]. Below 1, blocks are drawn by
            `rng`, or evenly spread without one, until the next would exceed the share;
            there is always at least one.
        shift: move each document's grid by a random 0 … K-1 positions (which shortens its first
            block), so that training starts blocks everywhere, as decoding does.
        rng: source of randomness; needed for `shift`.

    Returns:
        Layout: blocks in order of position, slots numbered in the same order without gaps.

    Raises:
        ValueError: for a length below 1, a block size below 1, a coverage outside (0, 1], or
            `shift` without `rng`.
    """
    lengths = np.asarray(document_lengths, dtype=np.int64).reshape(-1)
    if (lengths < 1).any():
        raise ValueError(f"document lengths must be at least 1, got {lengths.min()}")
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    if not 0.0 < coverage <= 1.0:
        raise ValueError(f"coverage must be in (0, 1], got {coverage}")
    if shift and rng is None:
        raise ValueError("shift=True needs rng: pass a numpy Generator with a known seed")

    first = np.full(len(lengths), block_size, dtype=np.int64)
    if shift and rng is not None:
        first = rng.integers(1, block_size, size=len(lengths), endpoint=True)
    prefix_start, prefix_end, draft_end = _grid(lengths, first, block_size)
    if coverage < 1.0:
        chosen = _choose(draft_end - prefix_end, coverage, rng)
        prefix_start, prefix_end, draft_end = (
            column[chosen] for column in (prefix_start, prefix_end, draft_end)
        )
    drafted = draft_end - prefix_end
    slot_start = np.cumsum(drafted) - drafted
    columns = (prefix_start, prefix_end, draft_end, slot_start)
    return Layout(*(column.astype(np.int32) for column in columns))


def _grid(
    lengths: NDArray[np.int64], first: NDArray[np.int64], block_size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Every block of every document; `first` [documents] is the length of a document's first."""
    ends = np.cumsum(lengths)
    starts = ends - lengths
    blocks = 1 + np.maximum(0, -(-(lengths - first) // block_size))
    document = np.repeat(np.arange(len(lengths)), blocks)
    number = np.arange(blocks.sum()) - np.repeat(np.cumsum(blocks) - blocks, blocks)
    prefix_start = starts[document]
    draft_end = np.minimum(prefix_start + first[document] + number * block_size, ends[document])
    offset = np.where(number == 0, 0, first[document] + (number - 1) * block_size)
    return prefix_start, prefix_start + offset, draft_end


def _choose(
    drafted: NDArray[np.int64], coverage: float, rng: np.random.Generator | None
) -> NDArray[np.intp]:
    """Sorted indexes of the blocks to keep; they draft at most `coverage` of the positions."""
    budget = coverage * drafted.sum()
    if rng is None:
        # A block is kept where the running target steps over another whole block.
        target = np.floor(np.arange(1, len(drafted) + 1) * coverage).astype(np.int64)
        order = np.flatnonzero(np.diff(target, prepend=0))
    else:
        order = rng.permutation(len(drafted))
    kept = order[np.cumsum(drafted[order]) <= budget]
    if len(kept) == 0:
        kept = (order if len(order) else np.arange(len(drafted)))[:1]
    return np.sort(kept)
