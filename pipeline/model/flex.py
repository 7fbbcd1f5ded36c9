"""FlexAttention: the block-sparse backend, whose cost follows the mask; for GPUs.

The kernel works on tiles of `TILE` queries by `TILE` keys. Which tiles hold an allowed pair, and
which allow all of theirs, follows from the smallest and largest of the three integers of `Spans`
in each tile, so the table of tiles is made of whole-tensor operations on the device: O(S + M) and
the number of tiles, without a look at single pairs and without waiting for the device. Its shapes
depend on those of the batch alone, so the compiled kernel is compiled once for each batch shape.
Letters: B batch, H heads, L = S + M rows, T = ceil(L / TILE) tiles of rows, D head size.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from pipeline.model.compiled import fail_at_the_recompile_limit
from pipeline.model.mask import Spans

TILE = 128
"""The kernel's own default, in rows and in keys."""
HUGE = torch.iinfo(torch.int32).max


@dataclass(frozen=True)
class FlexMask:
    """A training mask as FlexAttention takes it."""

    tiles: BlockMask

    @classmethod
    def from_spans(cls, spans: Spans, clean_tokens: int, first_row: int = 0) -> "FlexMask":
        """The rule `spans` [B, L] on its device; `clean_tokens` is S, the same in every row. The
        queries are the rows from `first_row` on."""
        some, every = tile_table(spans, clean_tokens, first_row)
        partial = some & ~every
        length = spans.block.shape[1]
        return cls(
            BlockMask.from_kv_blocks(
                *_listed(partial),
                *_listed(every),
                BLOCK_SIZE=TILE,
                mask_mod=_rule(spans, first_row),
                seq_lengths=(length - first_row, length),
            )
        )

    @property
    def computed_tiles(self) -> Tensor:
        """Tiles that the kernel visits, int64 [B]: what attention costs."""
        partial, every = self.tiles.kv_num_blocks, self.tiles.full_kv_num_blocks
        assert every is not None, "from_spans gives both"
        return (partial.sum((1, 2)) + every.sum((1, 2))).long()


def tile_table(spans: Spans, clean_tokens: int, first_row: int = 0) -> tuple[Tensor, Tensor]:
    """Which tiles to visit, and which of them need no look at the rule; bool [B, Q, T] each, for
    the Q tiles of queries, the rows from `first_row` on.

    The first may hold a tile without any allowed pair, where the rows of a tile belong to several
    documents; it never misses one. The second holds only tiles all of whose pairs are allowed.
    """
    length = spans.block.shape[1]
    keys = spans.block.int()
    queries = spans.rows(slice(first_row, None))
    lower, upper, block = queries.lower.int(), queries.upper.int(), queries.block.int()
    sees = lower < upper
    # Of rows that see anything of the clean section: what they see lies in [first, last).
    first = _lowest(torch.where(sees, lower, HUGE))
    last = _highest(torch.where(sees, upper, -1))
    begin = _tile_starts(length, keys)
    end = (begin + TILE).clamp(max=clean_tokens)
    some_clean = (first[..., None] < end) & (last[..., None] > begin) & (begin < clean_tokens)

    # Blocks stand in order, so those of a tile are a range of numbers.
    first_block, last_block = _block_range(block)
    first_key_block, last_key_block = _block_range(keys)
    some_slots = (first_block[..., None] <= last_key_block[:, None, :]) & (
        first_key_block[:, None, :] <= last_block[..., None]
    )
    first_query = first_row + _tile_starts(length - first_row, keys)[:, None]
    if spans.causal_slots:
        some_slots &= begin < first_query + TILE

    # Rows that the last tile lacks make it partial: the kernel then checks every pair.
    whole_keys = begin + TILE <= length
    whole = first_query + TILE <= length
    every_clean = (_highest(lower, HUGE)[..., None] <= begin) & (
        _lowest(upper, -1)[..., None] >= begin + TILE
    )
    every_clean &= (begin + TILE <= clean_tokens) & whole
    one_block = (_lowest(block, -1) == last_block) & (last_block >= 0)
    one_key_block = (_lowest(keys, -1) == last_key_block) & (last_key_block >= 0)
    every_slot = one_block[..., None] & one_key_block[:, None, :]
    every_slot &= last_block[..., None] == last_key_block[:, None, :]
    every_slot &= whole_keys & whole
    if spans.causal_slots:
        every_slot &= begin + TILE <= first_query + 1
    every = every_clean | every_slot
    return some_clean | some_slots, every


def attend_by_flex(query: Tensor, key: Tensor, value: Tensor, mask: FlexMask) -> Tensor:
    """Attention of `query` [B, H, L, D] over `key`, `value` [B, H_kv, L, D]; shaped as `query`.

    On a GPU forward and backward are compiled; elsewhere the kernel's reference runs, which holds
    all scores and is there to be tested against.
    """
    kernel = flex_attention
    if query.device.type == "cuda" and not torch.compiler.is_compiling():
        kernel = _compiled(torch.is_grad_enabled())
    shared = query.shape[1] != key.shape[1]
    return kernel(query, key, value, block_mask=mask.tiles, enable_gqa=shared)


@cache
def _compiled(training: bool) -> Any:
    """The kernel, by itself for training and for scoring: the limit of shapes that a function is
    compiled for is one for all that is compiled of it, and scoring must not use up training's.

    Shapes are static: batches come in few, and a kernel for shapes unknown is slower.
    """
    fail_at_the_recompile_limit()
    kernel: Any = flex_attention if training else _flex_for_scoring
    return torch.compile(kernel, dynamic=False)


def _flex_for_scoring(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
    return flex_attention(query, key, value, **options)


def _tile_starts(length: int, like: Tensor) -> Tensor:
    """First row of each tile of `length` rows, [T]."""
    return torch.arange(0, length, TILE, device=like.device)


def _block_range(block: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest and the highest block with a slot in each tile, [B, T] each; an empty range where
    there is none."""
    slot = block >= 0
    return _lowest(torch.where(slot, block, HUGE)), _highest(torch.where(slot, block, -1))


def _rule(spans: Spans, first_row: int) -> Any:
    lower, upper, block, causal_slots = spans.lower, spans.upper, spans.block, spans.causal_slots

    def allowed(batch: Tensor, head: Tensor, query: Tensor, column: Tensor) -> Tensor:
        row = query + first_row if first_row else query
        in_span = (lower[batch, row] <= column) & (column < upper[batch, row])
        query_block = block[batch, row]
        same_block = (query_block >= 0) & (query_block == block[batch, column])
        if causal_slots:
            same_block = same_block & (column <= row)
        return in_span | same_block

    return allowed


def _tiled(values: Tensor, padding: int) -> Tensor:
    """Rows [B, L] as tiles [B, T, TILE], the last one filled up with `padding`."""
    missing = -values.shape[1] % TILE
    return F.pad(values, (0, missing), value=padding).unflatten(1, (-1, TILE))


def _lowest(values: Tensor, padding: int = HUGE) -> Tensor:
    return _tiled(values, padding).amin(-1)


def _highest(values: Tensor, padding: int = -1) -> Tensor:
    return _tiled(values, padding).amax(-1)


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of tiles how many are chosen, int32 [B, 1, T], and all columns with the chosen
    ones first and in order, int32 [B, 1, T, T]."""
    columns = torch.argsort(chosen.int(), dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[:, None], columns.int()[:, None].contiguous()
