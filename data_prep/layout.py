"""The layout table of a packed sequence: which blocks are drafted, from what prefix, in what slots.

One row per diffusion block, in the columns of `COLUMNS`:

- `prefix_start`, `prefix_end`: the clean span `[prefix_start, prefix_end)` a block conditions on,
  from its document's start up to the block's first position;
- `draft_end`: the block drafts, and is scored on, positions `prefix_end … draft_end - 1`;
- `slot_start`: where its mask slots stand in the mask section.

Attention, position ids, labels and loss weights all follow from the tokens, the document lengths
and this table, so one trainer serves every layout. numpy only. Source: TiDAR (arXiv 2511.08923),
section 3.1, for the aligned full-coverage layout; other layouts are additions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tidar_common.errors import UserError

COLUMNS = ("prefix_start", "prefix_end", "draft_end", "slot_start")
RESPONSE = "response"
LOSS_SPANS = ("document", RESPONSE)
"""What is learnt of a document: all of it, or what stands behind its prompt."""
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
    def drafted(self) -> NDArray[np.int64]:
        """First position that each block drafts, and the one behind its last, [2, blocks]."""
        return np.stack([self.prefix_end, self.draft_end]).astype(np.int64)

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
    prompt_lengths: Sequence[int] | NDArray[np.integer] | None = None,
) -> Layout:
    """Lay blocks of `block_size` positions over every document.

    Args:
        document_lengths: tokens of each document, in order, [documents]. Leave the padding out:
            what has no length here gets no block.
        block_size: K, the most positions a block drafts. A document's last block may be shorter.
        coverage: share of the positions that are drafted, in (0, 1]. Below 1, blocks are drawn by
            `rng`, or evenly spread without one, until the next would exceed the share;
            there is always at least one.
        shift: let blocks start everywhere, as decoding does. At full coverage each document's grid
            is moved by a random 0 … K-1 positions, which shortens its first block. Below that
            every block is put at a position of its own, on no grid; blocks never overlap, and one
            that starts fewer than K positions before its document's end is short.
        rng: source of randomness; needed for `shift`.
        prompt_lengths: tokens at the start of each document that no block drafts, [documents]; 0
            everywhere by default. Blocks condition on them as on all text before; grids start
            behind them, and `coverage` is a share of the positions behind them.

    Returns:
        Layout: blocks in order of position, slots numbered in the same order without gaps.

    Raises:
        ValueError: for a length below 1, a prompt longer than its document, a block size below 1,
            a coverage outside (0, 1], or `shift` without `rng`.
    """
    if shift and rng is None:
        raise ValueError("shift=True needs rng: pass a numpy Generator with a known seed")
    _check(block_size, coverage)
    starts, begins, ends = _drafted_spans(document_lengths, prompt_lengths)
    if coverage < 1.0 and shift and rng is not None:
        document, block_start, block_end = scatter_blocks(begins, ends, block_size, coverage, rng)
    else:
        first = np.full(len(ends), block_size, dtype=np.int64)
        if shift and rng is not None:
            first = rng.integers(1, block_size, size=len(ends), endpoint=True)
        document, block_start, block_end = _grid(begins, ends, first, block_size)
    if coverage < 1.0:
        budget = coverage * float((ends - begins).sum())
        kept = _within(block_end - block_start, budget, _order(len(document), coverage, rng))
        document, block_start, block_end = document[kept], block_start[kept], block_end[kept]
    drafts = block_end - block_start
    columns = (starts[document], block_start, block_end, np.cumsum(drafts) - drafts)
    return Layout(*(column.astype(np.int32) for column in columns))


def _check(block_size: int, coverage: float) -> None:
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    if not 0.0 < coverage <= 1.0:
        raise ValueError(f"coverage must be in (0, 1], got {coverage}")


def _drafted_spans(
    document_lengths: Sequence[int] | NDArray[np.integer],
    prompt_lengths: Sequence[int] | NDArray[np.integer] | None,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Of each document with something to draft: where it starts, where what stands behind its
    prompt begins, and its end; int64 [documents] each."""
    lengths = np.asarray(document_lengths, dtype=np.int64).reshape(-1)
    if (lengths < 1).any():
        raise ValueError(f"document lengths must be at least 1, got {lengths.min()}")
    ends = np.cumsum(lengths)
    starts = ends - lengths
    if prompt_lengths is None:
        return starts, starts, ends
    prompts = np.asarray(prompt_lengths, dtype=np.int64).reshape(-1)
    if prompts.shape != lengths.shape or (prompts < 0).any() or (prompts > lengths).any():
        raise ValueError("prompt_lengths needs 0 … length for each document")
    begins = starts + prompts
    drafted = begins < ends
    return starts[drafted], begins[drafted], ends[drafted]


def aligned_tables(
    document_lengths: Sequence[Sequence[int]], block_size: int
) -> tuple[Int32Array, NDArray[np.int64]]:
    """`build_layout(lengths, block_size).table()` of many sequences at the price of one.

    Args:
        document_lengths: of each sequence, its documents' lengths without padding.
        block_size: as in `build_layout`.

    Returns:
        tuple: the tables one below the other, [rows, 4], and how many rows each has, [sequences].
    """
    lengths = np.array([n for sequence in document_lengths for n in sequence], dtype=np.int64)
    documents = np.array([len(sequence) for sequence in document_lengths])
    last = np.cumsum(documents) - 1
    ends = np.cumsum(lengths)
    ends -= np.repeat(np.concatenate(([0], ends[last[:-1]])), documents)
    begins = ends - lengths
    document, block_start, block_end = _grid(
        begins, ends, np.full(len(ends), block_size), block_size
    )
    table = np.empty((len(document), len(COLUMNS)), dtype=np.int32)
    table[:, 0], table[:, 1], table[:, 2] = begins[document], block_start, block_end
    table[:, 3] = block_start  # every position is drafted: its slot stands where it does
    rows = np.searchsorted(document, last, side="right")
    return table, np.diff(rows, prepend=0)


Blocks = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
"""Of each block: the number of its document, its first position, and the one behind its last."""


def _grid(
    begins: NDArray[np.int64], ends: NDArray[np.int64], first: NDArray[np.int64], block_size: int
) -> Blocks:
    """Every block of the spans `begins … ends - 1`; `first` is the length of a span's first."""
    blocks = 1 + np.maximum(0, -(-(ends - begins - first) // block_size))
    span = np.repeat(np.arange(len(ends)), blocks)
    # Cells of block_size stand side by side through each span; its ends clip the first and last.
    before = np.cumsum(blocks) - blocks
    cell = np.repeat(begins + first - (before + 1) * block_size, blocks)
    cell += np.arange(0, len(cell) * block_size, block_size)
    return span, np.maximum(cell, begins[span]), np.minimum(cell + block_size, ends[span])


def scatter_blocks(
    begins: NDArray[np.int64],
    ends: NDArray[np.int64],
    block_size: int,
    coverage: float,
    rng: np.random.Generator,
) -> Blocks:
    """Disjoint blocks that start at any position of the spans, at least as many as `coverage` asks
    for on average. Within a span all places of its number of blocks are equally likely.

    n blocks that do not overlap, of which the last may reach over the span's end, are n different
    cells out of `length - (n - 1) (K - 1)`: take K - 1 positions away behind each but the last.
    """
    lengths = ends - begins
    if len(lengths) == 0:
        return lengths, lengths, lengths
    total, reach = int(lengths.sum()), block_size - 1
    # A block that starts anywhere in a span drafts this much of it on average.
    inside = np.minimum(lengths, block_size)
    average = inside - inside * (inside - 1) / (2 * lengths)
    wanted = max(1, int(np.ceil(coverage * total * total / (lengths * average).sum())))
    # A span gets its share of the blocks, rounded up or down by one number for all.
    counts = np.diff(np.floor(wanted * np.cumsum(lengths) / total + rng.random()), prepend=0)
    counts = np.minimum(counts.astype(np.int64), -(-lengths // block_size))
    used = np.flatnonzero(counts)
    counts = counts[used]
    cells = lengths[used] - (counts - 1) * reach
    owner = np.repeat(np.arange(len(used)), cells)
    cell = np.arange(len(owner)) - np.repeat(np.cumsum(cells) - cells, cells)
    drawn = np.lexsort((rng.random(len(owner)), owner))  # the cells of each span in random order
    drawn = np.sort(drawn[cell < np.repeat(counts, cells)])
    number = np.arange(len(drawn)) - np.repeat(np.cumsum(counts) - counts, counts)
    span = used[owner[drawn]]
    block_start = begins[span] + cell[drawn] + number * reach
    return span, block_start, np.minimum(block_start + block_size, ends[span])


def _order(blocks: int, coverage: float, rng: np.random.Generator | None) -> NDArray[np.intp]:
    """The order in which blocks may use up the share of the positions."""
    if rng is not None:
        return rng.permutation(blocks)
    # A block is taken where the running target steps over another whole block.
    target = np.floor(np.arange(1, blocks + 1) * coverage).astype(np.int64)
    return np.flatnonzero(np.diff(target, prepend=0))


def _within(drafts: NDArray[np.int64], budget: float, order: NDArray[np.intp]) -> NDArray[np.intp]:
    """Sorted indexes of the blocks to keep: in `order`, until they draft `budget` positions."""
    kept = order[np.cumsum(drafts[order]) <= budget]
    if len(kept) == 0:
        kept = (order if len(order) else np.arange(len(drafts)))[:1]
    return np.sort(kept)


@dataclass(frozen=True)
class BlockSizes:
    """Several block sizes in one data set: a choice of K, drawn for every sequence."""

    sizes: tuple[int, ...]
    shares: tuple[float, ...]
    """How often each is drawn; they add up to 1."""

    @classmethod
    def checked(
        cls, sizes: Sequence[int] | None, shares: Sequence[float] | None, largest: int | None
    ) -> "BlockSizes | None":
        """From `layout.block_sizes` and `layout.block_shares`; None where there is no choice.

        Args:
            sizes: the values of K; None or empty for none but `layout.block_size`.
            shares: as many, of any sum; None draws all alike.
            largest: `layout.block_size`, which none may exceed; None leaves that open.

        Raises:
            UserError: naming the key that is wrong.
        """
        if not sizes:
            if shares:
                raise UserError("layout.block_shares: says how often to draw layout.block_sizes, "
                                "which has no value")  # fmt: skip
            return None
        if min(sizes) < 1:
            raise UserError(f"layout.block_sizes: must be at least 1, got {min(sizes)}")
        if largest is not None and max(sizes) > largest:
            raise UserError(
                f"layout.block_sizes: {max(sizes)} is above layout.block_size {largest}, the most "
                "that a block drafts; raise that"
            )
        alike = cls(tuple(sizes), (1 / len(sizes),) * len(sizes))
        return alike.with_shares(shares, "layout.block_shares") if shares else alike

    def with_shares(self, shares: Sequence[float], key: str) -> "BlockSizes":
        """The same sizes drawn by `shares` of any sum; raises UserError naming `key`."""
        total = sum(shares)
        if len(shares) != len(self.sizes) or min(shares) < 0 or total <= 0:
            raise UserError(
                f"{key}: needs a number for each of {len(self.sizes)} block sizes, none below 0 "
                "and one above"
            )
        return BlockSizes(self.sizes, tuple(share / total for share in shares))

    def draw(self, rng: np.random.Generator) -> int:
        """One of the sizes."""
        return int(rng.choice(self.sizes, p=self.shares))
