"""The exact key-value cache: what plain autoregressive decoding would hold, and nothing else.

Letters: B rows of a batch, L new tokens, H_kv key heads, D head size.
"""

import torch
from torch import Tensor

from pipeline.decoding.step import StepRule
from pipeline.model.config import ModelConfig


class KVCache:
    """Preallocated keys and values of the tokens that rows have kept; [2, B, H_kv, capacity, D]
    for each layer.

    A forward writes its keys behind the kept ones (`write`); what it does not come to keep is
    simply overwritten by the next forward, so nothing is ever copied, and rejected drafts and mask
    tokens leave no trace.

    Rows of one length are read by slicing. `ragged` rows have lengths of their own, which a step
    reads and moves on the device: rows write at their own ends, and a mask hides what lies behind
    them. `width` columns then take part in a forward: as many as the longest row needs, or a fixed
    number where shapes must not change (CUDA graphs).
    """

    def __init__(
        self,
        config: ModelConfig,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        batch_size: int = 1,
        ragged: bool = False,
    ) -> None:
        shape = (2, batch_size, config.num_kv_heads, capacity, config.head_dim)
        self.capacity = self.width = capacity
        self.dtype = dtype
        self.lengths = [0] * batch_size
        """Tokens kept in each row, as the host knows them; all equal unless the rows are ragged."""
        # Zeros, not garbage: what a mask hides is multiplied by 0, and 0 · NaN is NaN.
        self._layers = [
            torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)
        ]
        self.device_lengths: Tensor | None = None
        """The same on the device, int64 [B]; None for rows of one length."""
        self.places: tuple[Tensor, Tensor] | None = None
        """Of ragged rows, where the forward writes: rows [B, 1] and columns [B, L]."""
        if ragged:
            self.device_lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
            self._rows = torch.arange(batch_size, device=device)[:, None]
            self._columns = torch.arange(capacity, device=device)

    def row(self, number: int) -> "KVCache":
        """One row as a cache of its own, on the same memory, with a length of its own."""
        view = KVCache.__new__(KVCache)
        view.capacity = view.width = self.capacity
        view.dtype = self.dtype
        view.lengths, view.device_lengths, view.places = [self.lengths[number]], None, None
        view._layers = [layer[:, number : number + 1] for layer in self._layers]
        return view

    def set_length(self, row: int, length: int) -> None:
        """Keep the first `length` tokens of `row`."""
        self.lengths[row] = length
        if self.device_lengths is not None:
            self.device_lengths[row] = length

    def keep(self, count: int) -> None:
        """Keep the first `count` tokens of the last forward, in all rows alike."""
        for row, length in enumerate(self.lengths):
            self.set_length(row, length + count)

    def advance(self, accepted: Tensor, active: Tensor) -> None:
        """Keep the first token of a step's forward and the accepted drafts [B] behind it, in the
        rows where `active` [B] is 1: on the device, within the step. The host, once it knows how
        many they are, counts them in `lengths`."""
        if self.device_lengths is not None:
            self.device_lengths += (accepted + 1) * active

    def make_room(self, queries: int, multiple: int = 1) -> None:
        """Set `width` for a forward of so many queries, to a multiple of so many columns."""
        if self.device_lengths is not None:
            needed = -(-(max(self.lengths) + queries) // multiple) * multiple
            self.width = min(needed, self.capacity)

    def positions(self, offsets: Tensor) -> Tensor:
        """Positions of a step's queries, int64 [L] or ragged [B, L], from their `offsets` to the
        first; also says where the forward will write."""
        if self.device_lengths is None:
            return offsets + self.lengths[0]
        starts = self.device_lengths[:, None]
        self.places = self._rows, starts + self._columns[: len(offsets)]
        return starts + offsets

    @property
    def columns(self) -> Tensor:
        """Numbers of the columns that take part, of ragged rows, [width]."""
        return self._columns[: self.width]

    def bias(self, rule: StepRule) -> Tensor | None:
        """What is added to the scores of a forward (`StepRule`): [L, length + L], a view, or ragged
        [B, 1, L, width]; None for a single query that sees everything."""
        if self.device_lengths is not None:
            return rule.over_lengths(self.device_lengths, self.columns)
        return rule.over_prefix(self.lengths[0]) if len(rule.offsets) > 1 else None

    def layer(self, number: int) -> Tensor:
        """Keys and values of a layer, [2, B, H_kv, capacity, D]."""
        return self._layers[number]

    def write(self, number: int, new: Tensor) -> None:
        """Write the keys and values [B, L, 2, H_kv, D] of a layer behind the kept tokens.

        Raises:
            ValueError: when the capacity is too small for rows of one length.
        """
        if self.places is not None:
            rows, columns = self.places
            self._layers[number][:, rows, :, columns] = new
            return
        start = self.lengths[0]
        end = start + new.shape[1]
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, {end} are needed")
        self._layers[number][:, :, :, start:end] = new.permute(2, 0, 3, 1, 4)

    def seen(self, number: int, queries: int) -> tuple[Tensor, Tensor]:
        """Keys and values that a forward of so many queries attends to, views [B, H_kv, length + L,
        D], or ragged [B, H_kv, width, D]."""
        end = self.width if self.places is not None else self.lengths[0] + queries
        keys, values = self._layers[number][:, :, :, :end].unbind(0)
        return keys, values

    def extend(self, number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """`write` and `seen` at once, for a forward that makes keys and values [B, H_kv, L, D]."""
        self.write(number, torch.stack([key, value], dim=1).permute(0, 3, 1, 2, 4))
        return self.seen(number, key.shape[2])

    def kept(self, number: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the kept tokens of rows of one length, [B, H_kv, length, D], views."""
        return self.seen(number, 0)
