"""Attention over both sections by tiles of query rows: exact, and made of fused calls alone.

At full coverage a dense mask has (S + M)² entries and all are computed, about a quarter of them
for use: no clean row sees a slot, rows see nothing behind them, and slots only their own block.
Letters: B batch, H heads, D head size, S clean tokens, M mask slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.model.mask import Spans

TILE = 64
"""Keys are cut in multiples of this; a tile has at least so many query rows."""
TILES_PER_SECTION = 8
"""At most so many: each tile keeps its own copy of the keys it sees for the backward pass."""
SHORTEST_DOCUMENTS = 16
"""Mean tokens from which a call for each document beats tiles in a long clean section."""


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

    The result is that of the dense mask, to rounding. The clean section needs no tiles where a
    call for each document pays: that is plain causal attention, for which the fused kernel has a
    way without any mask.
    """

    clean_tokens: int
    """S"""
    documents: tuple[tuple[int, ...], ...] | None
    """Tokens of the documents of each sequence, padding as one, where `tiles` are of slots alone;
    None where they are of the clean section, too."""
    tiles: tuple[Tile, ...]

    @classmethod
    def from_spans(cls, spans: Spans) -> "TiledMask":
        """Tiles of the rule `spans`, tensors [B, S + M] on the CPU: the cuts depend on values."""
        width = spans.block.shape[1]
        clean = int((spans.block[0] < 0).sum())
        documents = _documents(spans.lower[:, :clean])
        tiles: list[Tile] = []
        for begin, end in ((0, 0 if documents else clean), (clean, width)):
            size = max(TILE, -(-(end - begin) // TILES_PER_SECTION))
            tiles += [
                _tile(spans, clean, start, min(start + size, end))
                for start in range(begin, end, size)
            ]
        return cls(clean, documents, tuple(tiles))

    def to(self, device: torch.device) -> "TiledMask":
        if device.type == "cpu":
            return self
        moved = [replace(t, mask=t.mask.to(device, non_blocking=True)) for t in self.tiles]
        return replace(self, tiles=tuple(moved))


@torch.compiler.disable  # cuts depend on the batch: each would be compiled anew
def attend_by_tiles(query: Tensor, key: Tensor, value: Tensor, mask: TiledMask) -> Tensor:
    """Attention of `query` [B, H, S + M, D] over `key`, `value` [B, H_kv, S + M, D]; shaped as
    `query`."""
    sections = (mask.clean_tokens, key.shape[2] - mask.clean_tokens)
    # Split once and joined anew for each tile: the gradient of a split is its parts, that of a
    # slice a tensor of the whole length. Along the tokens of [B, tokens, H, D], as the projections
    # leave them, so that joining moves whole rows.
    keys, values = (
        [section.split(TILE, dim=1) for section in x.transpose(1, 2).split(sections, dim=1)]
        for x in (key, value)
    )
    mixed = []
    if mask.documents is not None:
        own, query = query.split(sections, dim=2)
        before, content = (x.split(sections, dim=2)[0] for x in (key, value))
        mixed.append(_by_documents(own, before, content, mask.documents))
    rows = query.split([tile.rows for tile in mask.tiles], dim=2)
    mixed += [
        F.scaled_dot_product_attention(
            own, tile.join(keys), tile.join(values), attn_mask=tile.mask, enable_gqa=True
        )
        for tile, own in zip(mask.tiles, rows, strict=True)
    ]
    return torch.cat([part.transpose(1, 2) for part in mixed], dim=1).transpose(1, 2)


def _by_documents(
    query: Tensor, key: Tensor, value: Tensor, documents: tuple[tuple[int, ...], ...]
) -> Tensor:
    """Causal attention inside each document, of tensors [B, H, S, D]."""
    if all(len(lengths) == 1 for lengths in documents):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    mixed = []
    for *parts, lengths in zip(
        query.split(1), key.split(1), value.split(1), documents, strict=True
    ):
        pieces = zip(*(x.split(lengths, dim=2) for x in parts), strict=True)
        own = [
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            for q, k, v in pieces
        ]
        mixed.append(torch.cat(own, dim=2))
    return torch.cat(mixed)


def _documents(lower: Tensor) -> tuple[tuple[int, ...], ...] | None:
    """Tokens of the documents that start at `lower` [B, S]; None where tiles are faster: those of
    `TILE` rows follow documents closely, the larger ones of long sections do not."""
    found = tuple(
        tuple(torch.unique_consecutive(row, return_counts=True)[1].tolist()) for row in lower
    )
    count = sum(map(len, found))
    long = lower.shape[1] > TILE * TILES_PER_SECTION
    pays = count == len(found) or (long and lower.numel() >= SHORTEST_DOCUMENTS * count)
    return found if pays else None


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
