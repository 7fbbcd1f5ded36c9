"""Scaled dot-product attention behind one function, and the masks it takes.

Letters: B batch, H heads, Q queries, K keys, D head size, S clean tokens, M mask slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.model.mask import Spans

TILE = 64
"""Keys are cut in multiples of this; a tile has at least so many query rows."""
TILES_PER_SECTION = 8
"""At most so many: each tile keeps its own copy of the keys it sees for the backward pass."""


@dataclass(frozen=True)
class Tile:
    """Some consecutive query rows of one section, and the only keys that any of them sees."""

    rows: int
    clean: slice
    """Of the clean section's keys, in units of `TILE`."""
    slots: slice
    """Of the mask section's keys, in units of `TILE`."""
    mask: Tensor
    """bool [B, 1, rows, keys]: True where a row may attend."""

    def join(self, sections: Sequence[Sequence[Tensor]]) -> Tensor:
        """What this tile sees of two sections in pieces [B, TILE, H, D], as [B, H, keys, D]."""
        clean, slots = sections
        return torch.cat([*clean[self.clean], *slots[self.slots]], dim=1).transpose(1, 2)


@dataclass(frozen=True)
class TiledMask:
    """A training mask as tiles, which together hold every row once, in order.

    At full coverage a dense mask has (S + M)² entries and all are computed, about a quarter of
    them for use: no clean row sees a slot, rows see nothing behind them, and slots only their own
    block. The tiles leave the rest out. The result is that of the dense mask, to rounding.
    """

    clean_tokens: int
    """S"""
    tiles: tuple[Tile, ...]

    @classmethod
    def from_spans(cls, spans: Spans) -> "TiledMask":
        """Tiles of the rule `spans`, tensors [B, S + M] on the CPU: the cuts depend on values."""
        width = spans.block.shape[1]
        clean = int((spans.block[0] < 0).sum())
        tiles: list[Tile] = []
        for begin, end in ((0, clean), (clean, width)):
            size = max(TILE, -(-(end - begin) // TILES_PER_SECTION))
            tiles += [
                _tile(spans, clean, start, min(start + size, end))
                for start in range(begin, end, size)
            ]
        return cls(clean, tuple(tiles))


Mask = Tensor | TiledMask | None
"""What `attend` takes: a boolean tensor, the same cut into tiles, or None for causal."""


def training_mask(spans: Spans) -> Tensor | TiledMask:
    """The mask of a joint forward in the form that is fast on the device of `spans` [B, S + M]."""
    if spans.block.device.type == "cpu":
        return TiledMask.from_spans(spans)
    return spans.dense().unsqueeze(1)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
    """Attention of `query` [B, H, Q, D] over `key`, `value` [B, H_kv, K, D]; returns [B, H, Q, D].

    `mask` as a tensor is boolean, True where a query may attend, and broadcasts to [B, H, Q, K];
    None means causal with the last query at the last key. Grouped-query attention shares each key
    head among H / H_kv neighbouring query heads.
    """
    if isinstance(mask, TiledMask):
        return _attend_by_tiles(query, key, value, mask)
    if mask is None and query.shape[2] != key.shape[2]:
        # `is_causal` aligns the first query with the first key; a cache aligns the last ones.
        offset = key.shape[2] - query.shape[2]
        if query.shape[2] > 1:
            mask = causal_mask(query.shape[2], offset, query.device)
        causal = False
    else:
        causal = mask is None
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=True
    )


def causal_mask(num_queries: int, offset: int, device: torch.device) -> Tensor:
    """BoolTensor [num_queries, offset + num_queries]: query i sees keys 0 … offset + i."""
    rows = torch.arange(num_queries, device=device)[:, None]
    return torch.arange(offset + num_queries, device=device)[None, :] <= rows + offset


def _tile(spans: Spans, clean: int, start: int, end: int) -> Tile:
    """The tile of the rows `start … end - 1`, all of one section."""
    lower, upper = spans.lower[:, start:end], spans.upper[:, start:end]
    slot_block = spans.block[:, clean:].contiguous()
    own_block = spans.block[:, start:end].contiguous()
    sees = lower < upper
    clean_keys = slot_keys = slice(0, 0)
    if sees.any():
        clean_keys = _cover(int(lower[sees].min()), int(upper[sees].max()))
    if start >= clean:
        # Blocks stand in order in the mask section, so those of these rows are one run of slots.
        first = torch.searchsorted(slot_block, own_block[:, :1].contiguous())
        last = torch.searchsorted(slot_block, own_block[:, -1:].contiguous(), right=True)
        slot_keys = _cover(int(first.min()), int(last.max()))
    column = torch.arange(clean)[_tokens(clean_keys)]
    in_span = (lower[..., None] <= column) & (column < upper[..., None])
    same_block = own_block[..., None] == slot_block[:, None, _tokens(slot_keys)]
    mask = torch.cat([in_span, same_block], dim=-1).unsqueeze(1)
    return Tile(end - start, clean_keys, slot_keys, mask)


def _cover(start: int, end: int) -> slice:
    """The run of whole `TILE`s around `start … end - 1`, counted in tiles."""
    return slice(start // TILE, -(-end // TILE))


def _tokens(tiles: slice) -> slice:
    return slice(tiles.start * TILE, tiles.stop * TILE)


def _attend_by_tiles(query: Tensor, key: Tensor, value: Tensor, mask: TiledMask) -> Tensor:
    sections = (mask.clean_tokens, key.shape[2] - mask.clean_tokens)
    # Split once and joined anew for each tile: the gradient of a split is its parts, that of a
    # slice a tensor of the whole length. Along the tokens of [B, tokens, H, D], as the projections
    # leave them, so that joining moves whole rows.
    keys, values = (
        [section.split(TILE, dim=1) for section in x.transpose(1, 2).split(sections, dim=1)]
        for x in (key, value)
    )
    rows = query.split([tile.rows for tile in mask.tiles], dim=2)
    mixed = [
        F.scaled_dot_product_attention(
            own, tile.join(keys), tile.join(values), attn_mask=tile.mask, enable_gqa=True
        )
        for tile, own in zip(mask.tiles, rows, strict=True)
    ]
    return torch.cat([part.transpose(1, 2) for part in mixed], dim=1).transpose(1, 2)
