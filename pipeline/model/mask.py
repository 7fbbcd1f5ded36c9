"""Who may attend to whom: the attention rule of TiDAR training, written plainly and compactly.

The input is the clean section (S tokens) followed by the mask section (M slots):

    query \\ key             clean key at position j              slot of block b
    clean query, position i  iff j <= i, same document            never
    slot of block b          iff j < start of b, same document    iff the same block

With causal slots a slot sees of its block only itself and the slots before it.
`dense_mask` states the rule; `Spans` says the same in three integers per row, which is what
batches carry and what fast backends are built from. Source: TiDAR (arXiv 2511.08923), section 3.1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_prep.layout import Layout


def dense_mask(
    document_lengths: Sequence[int] | NDArray[np.integer],
    layout: Layout,
    causal_slots: bool = False,
) -> Tensor:
    """The attention rule of one packed sequence as a boolean matrix.

    Args:
        document_lengths: tokens of each document in order; their sum is S.
        layout: the sequence's blocks, M = `layout.num_slots` slots in all.
        causal_slots: whether slots see only earlier ones of their block and themselves.

    Returns:
        BoolTensor [S + M, S + M]: True where the query row may attend to the key column.
    """
    lengths = torch.as_tensor(np.asarray(document_lengths, dtype=np.int64))
    position = torch.arange(int(lengths.sum()))
    document = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    block = torch.from_numpy(layout.slot_block.astype(np.int64))
    block_start = torch.from_numpy(layout.prefix_end.astype(np.int64))
    block_document = document[block_start]

    clean_to_clean = (document[:, None] == document[None, :]) & (
        position[None, :] <= position[:, None]
    )
    clean_to_slot = torch.zeros(len(position), len(block), dtype=torch.bool)
    slot_to_clean = (block_document[block][:, None] == document[None, :]) & (
        position[None, :] < block_start[block][:, None]
    )
    slot_to_slot = block[:, None] == block[None, :]
    if causal_slots:
        slot_to_slot = slot_to_slot.tril()
    return torch.cat(
        [
            torch.cat([clean_to_clean, clean_to_slot], dim=1),
            torch.cat([slot_to_clean, slot_to_slot], dim=1),
        ]
    )


@dataclass(frozen=True)
class Spans:
    """The rule in three integers per row; tensors [..., S + M], integer.

    A row attends to the clean keys `lower … upper - 1`, and to the slots whose `block` equals its
    own (-1 in clean rows, which have none).
    """

    lower: Tensor
    upper: Tensor
    block: Tensor
    causal_slots: bool = field(default=False, kw_only=True)
    """Of the slots of its block a row sees only those that stand no later than itself. Slots of a
    block stand in order."""

    @property
    def clean_tokens(self) -> int:
        """S, the same in every sequence of a batch; tensors [B, S + M] on the CPU."""
        return int((self.block[0] < 0).sum())

    def rows(self, some: slice) -> "Spans":
        """The rule of some rows; their `lower` and `upper` still count from the first clean one."""
        lower, upper, block = (x[..., some] for x in (self.lower, self.upper, self.block))
        return Spans(lower, upper, block, causal_slots=self.causal_slots)

    def to(self, device: torch.device, non_blocking: bool = False) -> "Spans":
        lower, upper, block = (
            part.to(device, non_blocking=non_blocking)
            for part in (self.lower, self.upper, self.block)
        )
        return Spans(lower, upper, block, causal_slots=self.causal_slots)

    def dense(self) -> Tensor:
        """The rule as a BoolTensor [..., S + M, S + M], equal to `dense_mask` but for padding."""
        block = self.block.long()
        column = torch.arange(block.shape[-1], device=block.device)
        clean_key = (block < 0)[..., None, :]
        in_span = (self.lower[..., :, None] <= column) & (column < self.upper[..., :, None])
        same_block = block[..., :, None] == block[..., None, :]
        if self.causal_slots:
            same_block &= column <= column[:, None]
        return torch.where(clean_key, in_span, same_block)


def layout_spans(
    document_lengths: Sequence[int] | NDArray[np.integer], layout: Layout, num_slots: int
) -> NDArray[np.int32]:
    """`Spans` of one packed sequence as an int32 array [3, S + num_slots] (lower, upper, block).

    `num_slots` may exceed the layout's, so that sequences can stand in one batch: each spare slot
    attends to itself alone (a row without any key would be NaN).

    Raises:
        ValueError: when the layout needs more slots than `num_slots`.
    """
    if layout.num_slots > num_slots:
        raise ValueError(f"the layout needs {layout.num_slots} slots, {num_slots} were given")
    lengths = np.asarray(document_lengths, dtype=np.int64)
    total = int(lengths.sum())
    rows = np.zeros((3, total + num_slots), dtype=np.int32)
    lower, upper, block = rows
    lower[:total] = np.repeat(np.cumsum(lengths) - lengths, lengths)
    upper[:total] = np.arange(1, total + 1)
    block[:total] = -1
    owner = layout.slot_block
    used = slice(total, total + layout.num_slots)
    lower[used] = layout.prefix_start[owner]
    upper[used] = layout.prefix_end[owner]
    block[used] = owner
    spare = num_slots - layout.num_slots
    block[total + layout.num_slots :] = layout.num_blocks + np.arange(spare)
    return rows
