"""Attention over both sections by tiles of query rows: exact, without a mask of all pairs.

At full coverage a dense mask has (S + M)² entries and all are computed, about a quarter of them
for use: no clean row sees a slot, rows see nothing behind them, and slots only their own block.
Here rows meet the clean keys tile by tile, and slots their own block apart from that.

The two parts of a slot's attention are merged: a row's softmax over all keys is the mean of its
softmaxes over the parts, each weighted by the part's share of the sum of exponentials, whose
logarithm (the log-sum-exp) every part returns. The gradients of a part need the merged output and
the merged log-sum-exp, and nothing of the other parts. Sources: FlashAttention (arXiv 2205.14135),
section 3.1; Ring Attention (arXiv 2310.01889).

Letters: B batch, H heads, D head size, S clean tokens, M mask slots, L = S + M rows, N blocks,
K slots of the longest block; of a part, Q queries and K keys.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd.function import once_differentiable

from pipeline.model.mask import Spans

_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
"""What `scaled_dot_product_attention` calls on a CPU; only the first of its results comes out of
there."""


def attend_part(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention of some queries over a part of their keys.

    Args:
        query: [B, H, Q, D].
        key: [B, H, K, D].
        value: [B, H, K, D].
        bias: added to the scores, fp32, broadcasting to [B, H, Q, K]: 0, or -inf where a row may
            not attend. None is causal, of as many queries as keys.

    Returns:
        The output [B, H, Q, D] and the log-sum-exp of the scores, [B, H, Q] in fp32 (fp64 of fp64).
        A row that sees no key has the output 0; its log-sum-exp is any number.
    """
    if query.device.type == "cpu":
        return _FUSED(query, key, value, 0.0, bias is None, attn_mask=_fitting(bias, query))
    return attend_plainly(query, key, value, _causal(query) if bias is None else bias)


def part_gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `query`, `key` and `value` through this part, by `grad` of the merged `output`
    whose log-sum-exp is `lse`; other arguments as in `attend_part`."""
    if query.device.type == "cpu":
        return _FUSED_BACKWARD(
            grad, query, key, value, output, lse, 0.0, bias is None,
            attn_mask=_fitting(bias, query),
        )  # fmt: skip
    bias = _causal(query) if bias is None else bias
    return plain_gradients(grad, query, key, value, output, lse, bias)


def attend_plainly(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """`attend_part` by matrix products: on any device, and faster where there are few keys."""
    scores = _scores(query, key, bias)
    lse = scores.logsumexp(-1)
    weights = _weights(scores, lse).to(value.dtype)
    return weights @ value, lse


def plain_gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor,
    bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`part_gradients` by matrix products."""
    weights = _weights(_scores(query, key, bias), lse)
    along = (grad.to(lse.dtype) * output).sum(-1, keepdim=True)
    scores_grad = (weights * (grad @ value.mT - along) / math.sqrt(query.shape[-1])).to(key.dtype)
    return scores_grad @ key, scores_grad.mT @ query, weights.to(grad.dtype).mT @ grad


def _scores(query: Tensor, key: Tensor, bias: Tensor) -> Tensor:
    scores = (query / math.sqrt(query.shape[-1])) @ key.mT
    return scores.to(torch.promote_types(scores.dtype, torch.float32)) + bias


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    # Of a row without keys both are -inf, whose difference is no number.
    return (scores - lse.clamp_min(torch.finfo(lse.dtype).min)[..., None]).exp_()


def _fitting(bias: Tensor | None, query: Tensor) -> Tensor | None:
    """The bias in the type that the fused kernel reads it in, without a look: fp64 of fp64."""
    return bias if bias is None else bias.to(torch.promote_types(query.dtype, torch.float32))


def _causal(query: Tensor) -> Tensor:
    """The bias [Q, Q] of as many keys as queries."""
    blocked = torch.full((query.shape[2],) * 2, -math.inf, device=query.device)
    return blocked.triu_(1)


TILE = 64
"""A tile has at least so many query rows."""
TILES_PER_SECTION = 16
"""At most so many, but for documents with tiles of their own: each costs a few calls."""
SHORTEST_DOCUMENTS = 16
"""Mean tokens from which a tile for each document beats those of a long clean section."""


@dataclass(frozen=True)
class Tile:
    """Some consecutive rows of some sequences, and the only clean keys that any of them sees."""

    sequences: slice
    rows: slice
    """Among all L."""
    keys: slice
    """Among the S clean ones."""
    bias: Tensor | None
    """fp32 [sequences, 1, rows, keys]: 0 where a row may attend, else -inf; None is causal."""


@dataclass(frozen=True)
class Blocks:
    """The blocks of a batch side by side, filled up to the longest."""

    slots: Tensor
    """int64 [N, 1, K]: which of the B · L rows is a block's; any, where it has no more."""
    places: Tensor
    """int64 [B, M, 1, 2]: the block of a slot, and its place there."""
    bias: Tensor
    """fp32 [N, 1, K, K]: 0 where a slot of the block sees another, else -inf."""

    def gather(self, x: Tensor) -> Tensor:
        """The slots of `x` [B, H, L, D] by block, [N, H, K, D]."""
        heads = torch.arange(x.shape[1], device=x.device)
        index = self.slots * len(heads) + heads[:, None]
        # One copy, where heads lie innermost in memory.
        rows = x.transpose(1, 2).reshape(-1, x.shape[3])
        return rows.index_select(0, index.flatten()).view(*index.shape, -1)

    def scatter(self, x: Tensor) -> Tensor:
        """`x` [N, H, K, D] in the order of the mask section, [B, H, M, D]."""
        heads = torch.arange(x.shape[1], device=x.device)
        block, place = self.places.unbind(-1)
        index = (block * len(heads) + heads) * x.shape[2] + place
        rows = x.reshape(-1, x.shape[3])
        return rows.index_select(0, index.flatten()).view(*index.shape, -1).transpose(1, 2)


@dataclass(frozen=True)
class TiledMask:
    """A training mask as tiles, which together hold every row that sees a clean key, and blocks."""

    clean_tokens: int
    """Clean rows among the queries: S, or 0 where the slots come by themselves."""
    tiles: tuple[Tile, ...]
    keyless: Tensor
    """bool [B, 1, M]: slots that see no clean key, those of a document's first block."""
    blocks: Blocks | None
    """None without a mask section."""

    @classmethod
    def from_spans(cls, spans: Spans) -> "TiledMask":
        """Tiles of the rule `spans`, tensors [B, L] on the CPU: the cuts depend on values."""
        width = spans.block.shape[1]
        clean = spans.clean_tokens
        tiles = _document_tiles(spans.lower[:, :clean]) or _row_tiles(spans, 0, clean)
        tiles += _row_tiles(spans, clean, width)
        keyless = (spans.lower >= spans.upper)[:, None, clean:]
        return cls(clean, tuple(tiles), keyless, _blocks(spans.block, clean, spans.causal_slots))

    @classmethod
    def of_slots(cls, spans: Spans) -> "TiledMask":
        """The mask of the slots alone as queries [B, H, M, D] over all S + M keys, of which the
        first S get no gradient."""
        slots = spans.rows(slice(spans.clean_tokens, None))
        tiles = _row_tiles(slots, 0, slots.block.shape[1])
        keyless = (slots.lower >= slots.upper)[:, None]
        return cls(0, tuple(tiles), keyless, _blocks(slots.block, 0, slots.causal_slots))

    def to(self, device: torch.device) -> "TiledMask":
        if device.type == "cpu":
            return self
        blocks = self.blocks and Blocks(
            self.blocks.slots.to(device), self.blocks.places.to(device), self.blocks.bias.to(device)
        )
        tiles = tuple(
            tile if tile.bias is None else replace(tile, bias=tile.bias.to(device))
            for tile in self.tiles
        )
        return TiledMask(self.clean_tokens, tiles, self.keyless.to(device), blocks)


# Cuts depend on the batch: each would be compiled anew. `torch.compiler.disable` is the same, but
# imports the compiler at once, for three seconds of every command.
@_disable_dynamo
def attend_by_tiles(query: Tensor, key: Tensor, value: Tensor, mask: TiledMask) -> Tensor:
    """Attention of `query` [B, H, L, D] over `key`, `value` [B, H_kv, L, D]; shaped as `query`.

    With a mask `of_slots` the queries are the last rows of as many as there are keys.
    """
    shared = query.shape[1] // key.shape[1]
    if shared > 1:
        key, value = (x.repeat_interleave(shared, dim=1) for x in (key, value))
    mixed: Tensor = _TiledAttention.apply(query, key, value, mask)
    return mixed


class _TiledAttention(torch.autograd.Function):
    """Keeps the inputs, the output and a number for each row: what tiles see is never copied.

    Of more keys than queries the first are those of clean rows that are not there, and get no
    gradient.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: TiledMask) -> Tensor:
        output = _zeros_like(query)
        exact = torch.promote_types(query.dtype, torch.float32)
        lse = _zeros_like(query[..., :1], exact).squeeze(-1)
        for tile in mask.tiles:
            at, seen = _rows_and_keys(tile)
            output[at], lse[at] = attend_part(query[at], key[seen], value[seen], tile.bias)
        if mask.blocks is not None:
            slots = (slice(None), slice(None), slice(mask.clean_tokens, None))
            ahead = key.shape[2] - query.shape[2]
            rows = (query, key[:, :, ahead:], value[:, :, ahead:])
            q, k, v = map(mask.blocks.gather, rows)
            inside, own_lse = attend_plainly(q, k, v, mask.blocks.bias)
            inside, own_lse = map(mask.blocks.scatter, (inside, own_lse.unsqueeze(-1)))
            prefix_lse = lse[slots].masked_fill(mask.keyless, -math.inf).unsqueeze(-1)
            joint = torch.logaddexp(prefix_lse, own_lse)
            output[slots] *= (prefix_lse - joint).exp()
            output[slots] += (own_lse - joint).exp() * inside
            lse[slots] = joint.squeeze(-1)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.mask = mask
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, output, lse = ctx.saved_tensors
        mask: TiledMask = ctx.mask
        # A key's gradient is summed over tiles: in fp32 even of bf16.
        exact = torch.promote_types(query.dtype, torch.float32)
        query_grad = _zeros_like(query, exact)
        key_grad, value_grad = (_zeros_like(key, exact) for _ in range(2))
        ahead = key.shape[2] - query.shape[2]
        for tile in mask.tiles:
            at, seen = _rows_and_keys(tile)
            gradients = part_gradients(
                grad[at], query[at], key[seen], value[seen], output[at], lse[at], tile.bias
            )
            query_grad[at] = gradients[0]
            if not ahead:
                key_grad[seen] += gradients[1]
                value_grad[seen] += gradients[2]
        if mask.blocks is not None:
            slots = (slice(None), slice(None), slice(mask.clean_tokens, None))
            own_key, own_value = key[:, :, ahead:], value[:, :, ahead:]
            rows = (grad, query, own_key, own_value, output, lse.unsqueeze(-1))
            g, q, k, v, o, own_lse = map(mask.blocks.gather, rows)
            gradients = plain_gradients(g, q, k, v, o, own_lse.squeeze(-1), mask.blocks.bias)
            sums = (query_grad, key_grad[:, :, ahead:], value_grad[:, :, ahead:])
            for total, part in zip(sums, gradients, strict=True):
                total[slots] += mask.blocks.scatter(part)
        dtype = query.dtype
        return query_grad.to(dtype), key_grad.to(dtype), value_grad.to(dtype), None


def _zeros_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Zeros [B, H, L, D] that lie in memory as [B, L, H, D], as projections leave and take them."""
    batch, heads, length, size = x.shape
    zeros = torch.zeros(batch, length, heads, size, dtype=dtype or x.dtype, device=x.device)
    return zeros.transpose(1, 2)


def _rows_and_keys(tile: Tile) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Indexes into [B, H, L, …] of a tile's rows, and of the keys it sees."""
    heads = slice(None)
    return (tile.sequences, heads, tile.rows), (tile.sequences, heads, tile.keys)


def _document_tiles(lower: Tensor) -> list[Tile]:
    """A causal tile for each document, which start at `lower` [B, S]; padding counts as one. Empty
    where tiles of rows are faster: those of `TILE` rows follow documents closely, the larger ones
    of long sections do not."""
    documents = [torch.unique_consecutive(row, return_counts=True)[1].tolist() for row in lower]
    count = sum(map(len, documents))
    if count == len(documents):
        whole = slice(0, lower.shape[1])
        return [Tile(slice(None), whole, whole, None)]
    long = lower.shape[1] > TILE * TILES_PER_SECTION
    if not long or lower.numel() < SHORTEST_DOCUMENTS * count:
        return []
    tiles = []
    for number, lengths in enumerate(documents):
        end = 0
        for length in lengths:
            span = slice(end, end + length)
            end = span.stop
            tiles.append(Tile(slice(number, number + 1), span, span, None))
    return tiles


def _row_tiles(spans: Spans, begin: int, end: int) -> list[Tile]:
    """Tiles of all sequences over the rows `begin … end - 1`, those that see a clean key."""
    size = max(TILE, -(-(end - begin) // TILES_PER_SECTION))
    tiles = []
    for start in range(begin, end, size):
        rows = slice(start, min(start + size, end))
        lower, upper = spans.lower[:, rows], spans.upper[:, rows]
        sees = lower < upper
        if sees.any():
            keys = slice(int(lower[sees].min()), int(upper[sees].max()))
            key = torch.arange(keys.start, keys.stop)
            in_span = (lower[..., None] <= key) & (key < upper[..., None])
            tiles.append(Tile(slice(None), rows, keys, _bias(in_span)[:, None]))
    return tiles


def _blocks(block: Tensor, clean: int, causal_slots: bool) -> Blocks | None:
    """The runs of equal numbers in `block` [B, L], behind the first `clean` rows."""
    rows = torch.arange(block.numel()).view(block.shape)[:, clean:]
    block = block[:, clean:]
    if block.numel() == 0:
        return None
    starts = torch.ones_like(block, dtype=torch.bool)
    starts[:, 1:] = block[:, 1:] != block[:, :-1]
    number = starts.flatten().cumsum(0).view(block.shape) - 1
    first = rows[starts]
    place = rows - first[number]
    count, length = len(first), int(place.max()) + 1
    slots = torch.full((count, length), -1)
    slots[number, place] = rows
    there = slots >= 0
    allowed = there[:, None, :, None] & there[:, None, None, :]
    bias = _bias(allowed.tril() if causal_slots else allowed)
    places = torch.stack((number, place), dim=-1)[:, :, None]
    return Blocks(slots.clamp_min(0)[:, None], places, bias)


def _bias(allowed: Tensor) -> Tensor:
    """0 where `allowed`, else -inf."""
    return torch.zeros(allowed.shape).masked_fill_(~allowed, -math.inf)
