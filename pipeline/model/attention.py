"""Scaled dot-product attention behind one function, and the forms of mask it takes.

Letters: B batch, H heads, Q queries, K keys, D head size, S clean tokens, M mask slots.
"""

import logging
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.model.config import BACKENDS
from pipeline.model.flex import TILE, FlexMask, attend_by_flex
from pipeline.model.mask import Spans
from pipeline.model.tiles import TiledMask, attend_by_tiles

Mask = Tensor | TiledMask | FlexMask | None
"""What `attend` takes: a boolean tensor, the same in the form of a backend, or None for causal."""


@dataclass(frozen=True)
class SectionMasks:
    """The masks of a joint forward whose sections go through the model one after the other."""

    clean: Mask
    """Of the S clean rows over themselves."""
    slots: Mask
    """Of the M slots over all S + M keys."""


def training_mask(spans: Spans, device: torch.device, backend: str = "auto") -> Mask:
    """The mask of a joint forward on `device`, in the form of `backend`.

    Args:
        spans: the rule, tensors [B, S + M] on the CPU: what follows depends on their values, and
            asking a GPU for them would wait for it.
        device: where attention will run.
        backend: `auto` takes causal attention without any mask where the rule is just that (no
            mask section, and one document a sequence), else `flex` on a GPU and `tiles` on a CPU.
            `dense` computes every pair and is what the others are measured against.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        if is_causal(spans):
            return None
        backend = _kernel_for(spans, device)
    if backend == "tiles":
        return TiledMask.from_spans(spans).to(device)
    clean = spans.clean_tokens
    moved = spans.to(device, non_blocking=True)
    if backend == "flex":
        return FlexMask.from_spans(moved, clean)
    return moved.dense().unsqueeze(1)


def section_masks(spans: Spans, device: torch.device, backend: str = "auto") -> SectionMasks:
    """`training_mask` for each section by itself; the batch has a mask section."""
    clean = spans.clean_tokens
    text = training_mask(spans.rows(slice(0, clean)), device, backend)
    if backend == "auto":
        backend = _kernel_for(spans, device)
    if backend == "tiles":
        return SectionMasks(text, TiledMask.of_slots(spans).to(device))
    moved = spans.to(device, non_blocking=True)
    if backend == "flex":
        return SectionMasks(text, FlexMask.from_spans(moved, clean, first_row=clean))
    return SectionMasks(text, moved.dense()[:, None, clean:])


def _kernel_for(spans: Spans, device: torch.device) -> str:
    if device.type == "cpu":
        return "tiles"
    # Below a tile of queries FlexAttention takes another kernel, not for all numbers of heads.
    return "flex" if spans.block.shape[1] - spans.clean_tokens >= TILE else "dense"


def is_causal(spans: Spans) -> bool:
    """Whether the rule is plain causal attention: one document a sequence, and no mask section.

    Padding counts as a document; where sequences end in it the answer is no.
    """
    return bool((spans.block < 0).all() and (spans.lower == 0).all())


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
    """Attention of `query` [B, H, Q, D] over `key`, `value` [B, H_kv, K, D]; returns [B, H, Q, D].

    `mask` as a tensor is boolean, True where a query may attend, or added to the scores; it
    broadcasts to [B, H, Q, K]. None means causal with the last query at the last key. Grouped-query
    attention shares each key head among H / H_kv neighbouring query heads.
    """
    if isinstance(mask, TiledMask):
        return attend_by_tiles(query, key, value, mask)
    if isinstance(mask, FlexMask):
        return attend_by_flex(query, key, value, mask)
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


def fold_bias(bias: Tensor, batch: int, key_heads: int) -> Tensor:
    """A bias that broadcasts to [B, 1, Q, K] as `attend_folded` takes it, once for all layers."""
    bias = bias if bias.ndim == 4 else bias[None, None]
    if bias.shape[0] == 1:
        return bias
    return bias.expand(batch, key_heads, -1, -1).flatten(0, 1)[:, None]


def attend_folded(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, backend: SDPBackend | None
) -> Tensor:
    """Attention of a decoding step; returns [B, Q, H · D].

    The key heads are folded into the batch and the query heads of a group share theirs by a stride
    of zero: no kernel has to know of groups, and none repeats keys in memory. (Of the fused kernels
    that take a mask some refuse unequal heads, depending on the release of torch.)

    Args:
        query: [B, Q, H, D].
        key: [B, H_kv, K, D].
        value: [B, H_kv, K, D].
        bias: added to the scores, [1, 1, Q, K] or [B · H_kv, 1, Q, K]; None is none.
        backend: the only kernel that may run; None leaves it to torch.
    """
    batch, queries, heads, size = query.shape
    group = heads // key.shape[1]
    folded = query.unflatten(2, (-1, group)).permute(0, 2, 3, 1, 4).flatten(0, 1)
    key, value = (x.flatten(0, 1)[:, None].expand(-1, group, -1, -1) for x in (key, value))
    if bias is not None:
        bias = bias.expand(len(folded), group, -1, -1)
    with nullcontext() if backend is None else sdpa_kernel(backend):
        mixed = F.scaled_dot_product_attention(folded, key, value, attn_mask=bias)
    by_query = mixed.unflatten(0, (batch, -1)).permute(0, 3, 1, 2, 4)
    return by_query.reshape(batch, queries, heads * size)


def fused_backend(device: torch.device, dtype: torch.dtype, head_dim: int) -> SDPBackend | None:
    """The fused kernel that decoding steps with a bias run on `device`; None on a CPU, whose own
    fused kernel takes all.

    Asked of torch for the shapes of a step, so that neither the release nor a setting can put the
    unfused one (fp32 copies of all scores, keys and values) in its place unseen; where there is no
    fused kernel for such heads, a warning says so.
    """
    if device.type != "cuda":
        return None
    query = torch.empty(1, 1, 8, head_dim, dtype=dtype, device=device)
    key = torch.empty(1, 1, 256, head_dim, dtype=dtype, device=device)
    bias = torch.zeros(1, 1, 8, 256, dtype=dtype, device=device)
    asked = torch.backends.cuda.SDPAParams(query, key, key, bias, 0.0, False, False)
    if torch.backends.cuda.can_use_efficient_attention(asked):
        return SDPBackend.EFFICIENT_ATTENTION
    if torch.backends.cuda.can_use_cudnn_attention(asked):
        return SDPBackend.CUDNN_ATTENTION
    logging.getLogger(__name__).warning(
        "no fused attention for heads of %d in %s here: decoding runs the unfused kernel, which is "
        "slow", head_dim, dtype,
    )  # fmt: skip
    return SDPBackend.MATH


def causal_bias(num_queries: int, offset: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`causal_mask` as a bias, [1, 1, Q, K]."""
    return as_bias(causal_mask(num_queries, offset, device), dtype)[None, None]


def as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores, 0 or -inf, for a boolean mask of the same shape."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


def causal_mask(num_queries: int, offset: int, device: torch.device) -> Tensor:
    """BoolTensor [num_queries, offset + num_queries]: query i sees keys 0 … offset + i."""
    rows = torch.arange(num_queries, device=device)[:, None]
    return torch.arange(offset + num_queries, device=device)[None, :] <= rows + offset
