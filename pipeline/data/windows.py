"""Linear drafting: blocks of 2K - 1 slots, of which K places in a row are drafted.

A decoding step has one block for all counts. It stands behind d_0, and when the step makes m + 1
tokens final, the next draft begins at its slot m: the slot is stale by m, for the block saw nothing
of the m tokens between. So training draws a first place for each block, and labels the window of
places from there on. Drafts d_1 … d_{K-1} lie m + 1 … m + K - 1 slots into the block with
m ≤ K - 1, so slot 2K - 2 is the last that anything reads, and a 2K-th would never be.

A window is `[start, end)` in positions of the sequence; windows are int64 [2, blocks].
"""

import numpy as np
from numpy.typing import NDArray

from data_prep.layout import Layout
from pipeline.model.config import block_slots

STALER = 0.6
"""A first place m is drawn with probability 0.4 · 0.6^m, scaled so that those that are possible add
up to 1: as m counts accepted drafts, early places come up most."""


def draw_windows(layout: Layout, block_size: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """A window of up to K places in each block of a layout of 2K - 1 slots.

    The first place is one of 0 … K - 1, and never a block's last, behind which nothing would be
    drafted: a short block at a document's end has fewer to choose from, one of a single slot none.
    """
    lengths = layout.draft_lengths.astype(np.int64)
    choices = np.clip(lengths - 1, 1, block_size)
    below = rng.random(len(lengths)) * (1 - STALER**choices)
    first = np.floor(np.log1p(-below) / np.log(STALER)).astype(np.int64)
    start = layout.prefix_end + np.minimum(first, choices - 1)
    return np.stack([start, np.minimum(start + block_size, layout.draft_end)])


def stale_layout(
    layout: Layout, document_lengths: NDArray[np.integer], block_size: int, first: int
) -> tuple[Layout, NDArray[np.int64]]:
    """Blocks as a linear step has them, to be scored at one first place.

    Each block of `layout` gets the slots of a linear one, up to its document's end, and its window
    `first` places later: so the windows of all blocks meet each position once, as the blocks did,
    but for a document's first. Its block has nothing before it, as no block of a decoder; where it
    begins later it is left out.

    Args:
        layout: blocks of up to K positions.
        document_lengths: of the sequence, without padding, [documents].
        block_size: K.
        first: the first place m of all windows, 0 … K - 1.

    Returns:
        The layout with longer blocks, whose slots may outnumber the positions, and its windows;
        an empty one where the document ends before it.
    """
    if not 0 <= first < block_size:
        raise ValueError(f"first must be a place in 0 … {block_size - 1}, got {first}")
    ends = np.cumsum(document_lengths, dtype=np.int64)  # shards store them without a sign
    end = ends[np.searchsorted(ends, layout.prefix_end, side="right")]
    begin = layout.prefix_end.astype(np.int64)
    draft_end = np.minimum(begin + block_slots(block_size, True), end)
    lengths = draft_end - begin
    longer = Layout(
        layout.prefix_start,
        layout.prefix_end,
        draft_end.astype(np.int32),
        (np.cumsum(lengths) - lengths).astype(np.int32),
    )
    windows = np.minimum(layout.drafted + first, end)
    if first:
        nothing = layout.prefix_end == layout.prefix_start
        windows[1] = np.where(nothing, windows[0], windows[1])
    return longer, windows
