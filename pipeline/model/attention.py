"""Scaled dot-product attention behind one function.

Letters: B batch, H heads, Q queries, K keys, D head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of `query` [B, H, Q, D] over `key`, `value` [B, H_kv, K, D]; returns [B, H, Q, D].

    `mask` is boolean, True where a query may attend, and broadcasts to [B, H, Q, K]; None means
    causal with the last query at the last key. Grouped-query attention shares each key head among
    H / H_kv neighbouring query heads.
    """
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
