"""Scaled dot-product attention behind one function, and the forms of mask it takes.

Letters: B batch, H heads, Q queries, K keys, D head size, S clean tokens, M mask slots.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.model.config import BACKENDS
from pipeline.model.flex import FlexMask, attend_by_flex
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
        backend = "tiles" if device.type == "cpu" else "flex"
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
        backend = "tiles" if device.type == "cpu" else "flex"
    if backend == "tiles":
        return SectionMasks(text, TiledMask.of_slots(spans).to(device))
    moved = spans.to(device, non_blocking=True)
    if backend == "flex":
        return SectionMasks(text, FlexMask.from_spans(moved, clean, first_row=clean))
    return SectionMasks(text, moved.dense()[:, None, clean:])


def is_causal(spans: Spans) -> bool:
    """Whether the rule is plain causal attention: one document a sequence, and no mask section.

    Padding counts as a document; where sequences end in it the answer is no.
    """
    return bool((spans.block < 0).all() and (spans.lower == 0).all())


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
    """Attention of `query` [B, H, Q, D] over `key`, `value` [B, H_kv, K, D]; returns [B, H, Q, D].

    `mask` as a tensor is boolean, True where a query may attend, and broadcasts to [B, H, Q, K];
    None means causal with the last query at the last key. Grouped-query attention shares each key
    head among H / H_kv neighbouring query heads.
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


def causal_mask(num_queries: int, offset: int, device: torch.device) -> Tensor:
    """BoolTensor [num_queries, offset + num_queries]: query i sees keys 0 … offset + i."""
    rows = torch.arange(num_queries, device=device)[:, None]
    return torch.arange(offset + num_queries, device=device)[None, :] <= rows + offset
