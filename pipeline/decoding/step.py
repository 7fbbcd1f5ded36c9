"""The queries of one TiDAR decoding step: who they are and whom they see.

With P tokens kept and block size K the queries are `[d_0 … d_{K-1} | block 1 | … | block K]`,
K + K² tokens. Block j stands at positions P + j … P + j + K - 1 and is the draft that will be
needed if exactly j drafts are accepted. Source: TiDAR (arXiv 2511.08923), section 3.2.
"""

import torch
from torch import Tensor


def num_queries(block_size: int) -> int:
    return block_size + block_size * block_size


def step_positions(block_size: int, device: torch.device) -> Tensor:
    """Position of each query relative to P, int64 [K + K²]."""
    offset = torch.arange(block_size, device=device)
    blocks = torch.arange(1, block_size + 1, device=device)[:, None] + offset
    return torch.cat([offset, blocks.flatten()])


def step_mask(block_size: int, capacity: int, device: torch.device) -> Tensor:
    """BoolTensor [K + K², capacity + K + K²]: `capacity` columns of prefix, then the queries.

    Built once: `mask[:, capacity - P:]` is the mask over P kept tokens and the step's own queries.
    A draft sees the prefix and the drafts up to itself; a slot of block j sees the prefix, the
    drafts d_0 … d_{j-1} and its own block.
    """
    draft = torch.arange(block_size, device=device)
    block = torch.arange(1, block_size + 1, device=device).repeat_interleave(block_size)
    none = torch.zeros(block_size, block_size**2, dtype=torch.bool, device=device)
    drafts = torch.cat([draft[None, :] <= draft[:, None], none], dim=1)
    slots = torch.cat([draft[None, :] < block[:, None], block[None, :] == block[:, None]], dim=1)
    queries = torch.cat([drafts, slots])
    prefix = torch.ones(len(queries), capacity, dtype=torch.bool, device=device)
    return torch.cat([prefix, queries], dim=1)


def block_rows(block_size: int, accepted: int) -> slice:
    """The query rows of block `accepted` (1 … K)."""
    start = block_size * accepted
    return slice(start, start + block_size)


def prefill_mask(prompt_length: int, block_size: int, device: torch.device) -> Tensor:
    """BoolTensor [N + K, N + K] for the first forward: a causal prompt and one block behind it."""
    total = prompt_length + block_size
    mask = torch.ones(total, total, dtype=torch.bool, device=device).tril()
    mask[prompt_length:, prompt_length:] = True
    return mask
