"""The sequential draft head: each place of a block knows the tokens drafted before it.

Mask slots are blind to each other's draws, so the places of a block are drawn independently, and
even place 1 does not know the token at place 0, which the verifier draws in the same forward. With
h_i the final hidden state of the slot at place i, u_i the token before that place, W the LM head
[V, E] and B a matrix [V, r] of low rank:

    z_i, s_i = cell(h_i, embed(u_i), s_{i-1})        i = 1 … K - 1
    logits_i = h_i · W + z_i · B

Place 0 has z = 0: verification has drawn its token before anything is drafted. s_0 is made of the
hidden state of the AR row that drew it. B starts at zero, so that a model starts as it was. Without
a slot a learned vector stands for h_i in the cell, and a projection of that AR row for h_i in the
base logits: so the head drafts where a step has no block, too.

Hidden states and embeddings go in with their root mean square set to one; what the head reads of
the AR half (that row, and embeddings) is taken as given, without gradient.
Letters: B batch, N blocks, K places, E hidden size, V vocabulary, r rank, w width of the cell,
P width of what the cell adds up, R rows of a joint forward.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.model.config import ModelConfig
from pipeline.model.parameters import Opening


@dataclass(frozen=True)
class BlockRows:
    """The blocks of a batch, for what goes through a block's places in order.

    N blocks, K places of the longest. The labelled slots of the batch are those that are there
    here, block by block and place by place.
    """

    slots: Tensor
    """int64 [N, K]: the row of each place among B · (S + M); -1 where a short block has no more."""
    starts: Tensor
    """int64 [N]: the clean row whose logits are for place 0, which decoding has drawn before; -1
    for a block at a document's start."""
    before: Tensor
    """int64 [N, K]: the token of the text before each place; 0 where there is none."""
    alone: Tensor
    """int64 [A]: blocks that are drafted once more without their slots. The rows for that follow
    behind all others: place i of the a-th of them has row B · (S + M) + a · K + i."""

    @property
    def there(self) -> Tensor:
        """bool [N, K]"""
        return self.slots >= 0

    def to(self, device: torch.device, non_blocking: bool = False) -> "BlockRows":
        slots, starts, before, alone = (
            field.to(device, non_blocking=non_blocking)
            for field in (self.slots, self.starts, self.before, self.alone)
        )
        return BlockRows(slots, starts, before, alone)


class LinearCell(nn.Module):
    """Knows the slot and the last token: z is a linear map of both (a Markov head)."""

    remembers = False

    def __init__(self, hidden_size: int, rank: int, width: int) -> None:
        super().__init__()
        self.slot = nn.Linear(hidden_size, rank, bias=False)
        self.token = nn.Linear(hidden_size, rank, bias=False)

    def first(self, row: Tensor) -> Tensor:
        """The state before place 1, from the AR row [..., E]; nothing here."""
        return row[..., :0]

    def step(self, part: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """z [..., r] and the next state, of the summed inputs `part` [..., P]."""
        return part, state


class MlpCell(LinearCell):
    """The same with a hidden layer between."""

    def __init__(self, hidden_size: int, rank: int, width: int) -> None:
        nn.Module.__init__(self)
        self.slot = nn.Linear(hidden_size, width)
        self.token = nn.Linear(hidden_size, width, bias=False)
        self.down = nn.Linear(width, rank, bias=False)

    def step(self, part: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return self.down(F.silu(part)), state


class GruCell(nn.Module):
    """Remembers all tokens of the draft and the AR row before it (Cho et al., arXiv 1406.1078)."""

    remembers = True

    def __init__(self, hidden_size: int, rank: int, width: int) -> None:
        super().__init__()
        self.slot = nn.Linear(hidden_size, 3 * width)
        self.token = nn.Linear(hidden_size, 3 * width, bias=False)
        self.state = nn.Linear(width, 3 * width)
        self.start = nn.Linear(hidden_size, width)
        self.down = nn.Linear(width, rank, bias=False)

    def first(self, row: Tensor) -> Tensor:
        return torch.tanh(self.start(row))

    def step(self, part: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        reset_in, update_in, new_in = part.chunk(3, dim=-1)
        reset, update, new = self.state(state).chunk(3, dim=-1)
        candidate = torch.tanh(new_in + torch.sigmoid(reset_in + reset) * new)
        state = torch.lerp(candidate, state, torch.sigmoid(update_in + update))
        return self.down(state), state


CELLS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "linear": LinearCell,
    "mlp": MlpCell,
    "gru": GruCell,
}


class Matrix(nn.Linear):
    """A linear map whose matrix may be asked for: in here it is whole even where ZeRO 3 has cut it
    up."""

    def forward(self, input: Tensor, then: Callable[[Tensor, Tensor], Any] | None = None) -> Any:
        return super().forward(input) if then is None else then(input, self.weight)


@dataclass(frozen=True)
class DraftRows:
    """The rows of a joint forward with what the head adds to them."""

    hidden: Tensor
    """[R + A · K, E]: the rows of the forward, then those of blocks drafted by the head alone."""
    z: Tensor
    """[R + A · K, r]: 0 in clean rows and at place 0."""


class DraftHead(nn.Module):
    """See the module's text. Parameters are about `3 w (2 E + w) + 2 E² + V r` for a GRU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size, width = config.hidden_size, config.draft_width or config.hidden_size
        self.cell: Any = CELLS[config.draft_cell](size, config.draft_rank, width)
        self.up = Matrix(config.draft_rank, config.num_embeddings, bias=False)
        """B"""
        self.no_slot = nn.Parameter(torch.zeros(size))
        """In place of a slot's hidden state in the cell."""
        self.plain = nn.Linear(size, size, bias=False)
        """Of the AR row: in place of a slot's hidden state under the LM head."""

    def slot_parts(self, hidden: Tensor) -> Tensor:
        """What the cell adds up of slots [..., E]: [..., P]."""
        return self.cell.slot(unit(hidden))

    def token_parts(self, embedded: Tensor) -> Tensor:
        """What it adds up of the embeddings of tokens, [..., E] to [..., P]."""
        return self.cell.token(unit(embedded))

    def first(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """From the AR row that draws place 0, [..., E]: the cell's state before place 1 [..., w],
        and what stands for slots under the LM head where there are none [..., E]."""
        row = unit(row)
        return self.cell.first(row), self.plain(row)

    def scan(self, parts: Tensor, state: Tensor) -> Tensor:
        """z [N, k, r] of k places one after the other; `parts` [N, k, P], `state` [N, w]."""
        if not self.cell.remembers:
            return self.cell.step(parts, state)[0]
        steps = []
        for part in parts.unbind(1):
            z, state = self.cell.step(part, state)
            steps.append(z)
        return torch.stack(steps, dim=1)

    def forward(
        self, hidden: Tensor, blocks: BlockRows, embed: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """All blocks of a batch at once, each place after the text's own tokens (teacher forcing).

        Args:
            hidden: final hidden states of the joint forward, [R, E].
            blocks: where its blocks stand.
            embed: the model's embedding, [...] to [..., E].

        Returns:
            The fields of `DraftRows`, to be multiplied with `[W | B]`; as plain tensors, at which
            ZeRO 3 makes the module's own parameters whole again for the backward pass.
        """
        size = blocks.slots.shape[1]
        alone = len(blocks.alone)
        if size < 2:
            return hidden, hidden.new_zeros(len(hidden), self.up.in_features)
        slots = hidden[blocks.slots[:, 1:].clamp_min(0)]
        with torch.no_grad():
            tokens = embed(blocks.before[:, 1:])
            # A block at a document's start has no row before it, and begins from nothing.
            known = (blocks.starts >= 0)[:, None].to(hidden.dtype)
            begin = hidden[blocks.starts.clamp_min(0)] * known
        state, plain = self.first(begin)
        from_tokens = self.token_parts(tokens)
        z = self.scan(self.slot_parts(slots) + from_tokens, state)
        rows, width = len(hidden), self.up.in_features
        # Places that short blocks lack go into one row too many, which is cut off.
        last = rows + alone * size
        place = torch.where(blocks.slots[:, 1:] >= 0, blocks.slots[:, 1:], last)
        values = [z.reshape(-1, width)]
        places = [place.flatten()]
        if alone:
            without = self.slot_parts(self.no_slot) + from_tokens[blocks.alone]
            parts = self.scan(without, state[blocks.alone])
            values.append(parts.reshape(-1, width))
            index = rows + torch.arange(alone * size, device=hidden.device).view(alone, size)
            places.append(index[:, 1:].flatten())
            behind = plain[blocks.alone][:, None].expand(alone, size, -1).flatten(0, 1)
            hidden = torch.cat([hidden, behind])
        empty = hidden.new_zeros(last + 1, width)
        full = empty.index_put((torch.cat(places),), torch.cat(values).to(empty.dtype))
        return hidden, full[:last]

    @torch.no_grad()
    def reset(self, seed: int, opened: Opening) -> None:
        """Draw the weights anew from `seed`, through `opened` (see `Opening`).

        Uniform within ± 1 / sqrt(inputs), as torch's linear layers; B, biases and the vector in
        place of slots are zero.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            with opened(parameter) as writes:
                if not writes:
                    continue
                if parameter.ndim == 1 or name == "up.weight":
                    parameter.zero_()
                    continue
                bound = 1 / math.sqrt(parameter.shape[1])
                drawn = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
                parameter.copy_(drawn.uniform_(-bound, bound, generator=generator))


def unit(x: Tensor) -> Tensor:
    """`x` [..., E] with root mean square 1, computed in fp32."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=1e-12).to(x.dtype)
