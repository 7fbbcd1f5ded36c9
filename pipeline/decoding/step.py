"""The queries of one decoding step: who they are and whom they see.

With P tokens kept, n tokens in hand and block size K the queries are `[d_0 … d_{n-1} | blocks]`.
Block j is K mask tokens at positions P + j … P + j + K - 1: the draft that will be needed if
exactly j of the n are accepted. The published step has n = K and all blocks 1 … K, K + K² tokens.
Any block may be left out; when it would have been needed, a draft head drafts without it, or, where
there is none, a short step with one token and block 1 follows. Plain autoregression is the step of
one token and no block, verification of another's drafts (prompt lookup, a smaller model) the step
of n tokens and no block.

A model of linear drafts has one block for all counts, block 1, with 2K - 1 slots: K + 2K - 1
tokens. Behind j accepted tokens the next draft begins at its slot j - 1, which saw d_0 alone.
Source: TiDAR (arXiv 2511.08923), section 3.2.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from pipeline.model.attention import as_bias
from pipeline.model.config import block_slots


@dataclass(frozen=True)
class StepShape:
    """What stands in a step."""

    tokens: int
    """n in hand: the one that is final already, d_0, and the drafts behind it."""
    block_size: int = 0
    """K; 0 where nothing is drafted."""
    blocks: tuple[int, ...] = ()
    """The numbers j of the blocks, in increasing order, each in 1 … n."""
    sequential: bool = False
    """Whether the model has a draft head: a row whose block is not there is drafted all the same,
    and needs no short step."""
    linear: bool = False
    """Whether block 1 serves all counts; no other can be there then."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"a step has at least one token, got {self.tokens}")
        inside = all(1 <= block <= self.tokens for block in self.blocks)
        if not inside or list(self.blocks) != sorted(set(self.blocks)):
            raise ValueError(
                f"blocks must be increasing numbers in 1 … {self.tokens}, got {self.blocks}"
            )
        if self.linear and self.blocks not in ((), (1,)):
            raise ValueError(f"a linear step has block 1 or none, got {self.blocks}")

    @classmethod
    def full(cls, block_size: int) -> "StepShape":
        """The published step: every block is there."""
        return cls(block_size, block_size, tuple(range(1, block_size + 1)))

    @classmethod
    def one_block(cls, block_size: int) -> "StepShape":
        """The step of linear drafts."""
        return cls(block_size, block_size, (1,), sequential=True, linear=True)

    @classmethod
    def unmasking(cls, block_size: int) -> "StepShape":
        """Of block diffusion: it reads a finished block, and the token before it, and opens the
        next block."""
        return cls(block_size + 1, block_size, (block_size + 1,))

    @property
    def drafting(self) -> bool:
        """Whether the model drafts itself, be it in the short step alone."""
        return self.block_size > 0

    @property
    def short(self) -> "StepShape":
        """The step of a row that has no draft: one token, and the block behind it; no block where
        a draft head does without any."""
        block = self.drafting and (bool(self.blocks) or not self.sequential)
        return replace(self, tokens=1, blocks=(1,) if block else ())

    @property
    def block_slots(self) -> int:
        """Slots of each block."""
        return block_slots(self.block_size, self.linear)

    @property
    def prefill_slots(self) -> int:
        """Slots behind a prompt."""
        return self.block_slots if self.short.blocks else 0

    def has_block(self, accepted: int) -> bool:
        """Whether the step has slots for what follows so many accepted tokens, 1 … n."""
        return accepted in self.blocks or (self.linear and bool(self.blocks) and accepted > 0)

    def drafted_after(self, accepted: int) -> bool:
        """Whether a row has a draft behind a step that made so many tokens final."""
        return self.has_block(accepted) or (self.sequential and self.block_size > 1)

    @property
    def num_queries(self) -> int:
        return self.tokens + self.block_slots * len(self.blocks)

    def block_rows(self, accepted: int) -> slice:
        """The query rows of the K slots for what follows so many accepted tokens, which must be
        there."""
        start = self.tokens
        start += accepted - 1 if self.linear else self.block_size * self.blocks.index(accepted)
        return slice(start, start + self.block_size)

    def block_starts(self) -> list[int]:
        """First of these rows for 0 … n accepted tokens; -1 where there are none."""
        return [
            self.block_rows(accepted).start if self.has_block(accepted) else -1
            for accepted in range(self.tokens + 1)
        ]


def num_queries(block_size: int) -> int:
    """Queries of the published step, K + K²."""
    return StepShape.full(block_size).num_queries


def step_positions(shape: StepShape, device: torch.device) -> Tensor:
    """Position of each query relative to P, int64 [Q]."""
    offsets = list(range(shape.tokens))
    for block in shape.blocks:
        offsets += range(block, block + shape.block_slots)
    return torch.tensor(offsets, dtype=torch.int64, device=device)


def step_rule(shape: StepShape, device: torch.device, causal_slots: bool = False) -> Tensor:
    """BoolTensor [Q, Q]: which of a step's queries each of them sees; all see the whole prefix.

    A token in hand sees those up to itself; a slot of block j sees d_0 … d_{j-1} and its own block,
    of a model with `causal_slots` only up to itself.
    """
    tokens = torch.arange(shape.tokens, device=device)
    numbers = torch.tensor(shape.blocks, dtype=torch.int64, device=device)
    block = numbers.repeat_interleave(shape.block_slots)
    none = torch.zeros(shape.tokens, len(block), dtype=torch.bool, device=device)
    token_rows = torch.cat([tokens[None, :] <= tokens[:, None], none], dim=1)
    same_block = block[None, :] == block[:, None]
    if causal_slots:
        same_block = same_block.tril()
    slots = torch.cat([tokens[None, :] < block[:, None], same_block], dim=1)
    return torch.cat([token_rows, slots])


def step_mask(
    shape: StepShape, capacity: int, device: torch.device, causal_slots: bool = False
) -> Tensor:
    """BoolTensor [Q, capacity + Q]: `capacity` columns of prefix, then the queries.

    Built once: `mask[:, capacity - P:]` is the mask over P kept tokens and the step's own queries.
    """
    rule = step_rule(shape, device, causal_slots)
    return torch.cat([rule.new_ones(len(rule), capacity), rule], dim=1)


class StepRule:
    """A step's mask as an additive bias, for any number of kept tokens; from tables built once."""

    def __init__(
        self,
        shape: StepShape,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
        causal_slots: bool = False,
    ) -> None:
        self.shape = shape
        self.capacity = capacity
        self.offsets = step_positions(shape, device)
        self.causal_slots, self.device, self._dtype = causal_slots, device, dtype

    @cached_property
    def _sliced(self) -> Tensor:
        mask = step_mask(self.shape, self.capacity, self.device, self.causal_slots)
        return as_bias(mask, self._dtype)

    @cached_property
    def _bordered(self) -> Tensor:
        return bordered(step_rule(self.shape, self.device, self.causal_slots), self._dtype)

    def over_prefix(self, length: int) -> Tensor:
        """Bias [Q, length + Q], a view."""
        return self._sliced[:, self.capacity - length :]

    def over_lengths(self, lengths: Tensor, columns: Tensor) -> Tensor:
        """Bias [B, 1, Q, W] for rows with `lengths` [B] kept tokens; `columns` is 0 … W - 1."""
        return look_up(self._bordered, columns[None, :] - lengths[:, None])


def bordered(rule: Tensor, dtype: torch.dtype) -> Tensor:
    """Bias [Q, Q + 2] of a rule [Q, Q]: a column that all see (the prefix), the rule, one that none
    sees."""
    seen = rule.new_ones(len(rule), 1)
    return as_bias(torch.cat([seen, rule, ~seen], dim=1), dtype)


def look_up(table: Tensor, relative: Tensor) -> Tensor:
    """Bias [B, 1, Q, W] from a `bordered` table; `relative` [B, W] is each column's number behind
    the kept tokens, negative for these."""
    index = (relative + 1).clamp_(0, table.shape[1] - 1)
    return table[:, index].permute(1, 0, 2).unsqueeze(1)


class PrefillRule:
    """The same for the last tokens of a prompt, filled up to T, and M slots behind them; how many
    of the T count is read on the device."""

    def __init__(
        self, count: Tensor, size: int, slots: int, dtype: torch.dtype, causal_slots: bool
    ) -> None:
        """`count` is an int64 scalar, 1 … T, with T = `size` and M = `slots`."""
        self._count, self._size = count, size
        numbers = torch.arange(size, device=count.device)
        self.offsets = torch.cat([numbers, count + torch.arange(slots, device=count.device)])
        self.rows = self.offsets.new_empty(1 + slots)
        """Of the last token and the slots, among the queries, [1 + M]."""
        self.rows[:1] = count - 1
        self.rows[1:] = size + torch.arange(slots, device=count.device)
        rule = prefill_mask(0, size, slots, count.device, causal_slots)
        self._table = bordered(rule, dtype)

    def over_lengths(self, lengths: Tensor, columns: Tensor) -> Tensor:
        """Bias [B, 1, T + M, W], as `StepRule.over_lengths`."""
        relative = columns[None, :] - lengths[:, None]
        bias = look_up(self._table, relative)
        filling = (relative >= self._count) & (relative < self._size)
        bias[:, :, self._size :].masked_fill_(filling[:, None, None], -torch.inf)
        return bias


def prefill_mask(
    kept: int, count: int, num_slots: int, device: torch.device, causal_slots: bool = False
) -> Tensor:
    """BoolTensor [count + M, kept + count + M]: the last tokens of a prompt and, behind them, a
    block of M = `num_slots`.

    The tokens are causal and see `kept` earlier ones; the block sees everything and itself, slot
    by slot only up to itself with `causal_slots`.
    """
    total = count + num_slots
    among = torch.ones(total, total, dtype=torch.bool, device=device).tril()
    if not causal_slots:
        among[count:, count:] = True
    before = torch.ones(total, kept, dtype=torch.bool, device=device)
    return torch.cat([before, among], dim=1)
