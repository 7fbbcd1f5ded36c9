"""The exact key-value cache: what plain autoregressive decoding would hold, and nothing else.

Letters: B rows of a batch, L new tokens, H_kv key heads, D head size.
"""

import torch
from torch import Tensor

from pipeline.decoding.step import StepRule
from pipeline.model.config import ModelConfig


class KVCache:
    """Preallocated keys and values of the tokens that rows have kept; [B, H_kv, capacity, D] for
    each layer.

    A forward writes its keys behind the kept ones (`extend`); what it does not come to keep is
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
        shape = (batch_size, config.num_kv_heads, capacity, config.head_dim)
        self.capacity = self.width = capacity
        self.lengths = [0] * batch_size
        """Tokens kept in each row, as the host knows them; all equal unless the rows are ragged."""
        # Zeros, not garbage: what a mask hides is multiplied by 0, and 0 · NaN is NaN.
        self._keys = [
            torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)
        ]
        self._values = [torch.zeros_like(key) for key in self._keys]
        self.device_lengths: Tensor | None = None
        """The same on the device, int64 [B]; None for rows of one length."""
        if ragged:
            self.device_lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
            self._rows = torch.arange(batch_size, device=device)[:, None]
            self._columns = torch.arange(capacity, device=device)
            self._places = self.device_lengths[:, None]

    def row(self, number: int) -> "KVCache":
        """One row as a cache of its own, on the same memory, with a length of its own."""
        view = KVCache.__new__(KVCache)
        view.capacity = view.width = self.capacity
        view.lengths, view.device_lengths = [self.lengths[number]], None
        view._keys = [keys[number : number + 1] for keys in self._keys]
        view._values = [values[number : number + 1] for values in self._values]
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
        self._places = self.device_lengths[:, None] + self._columns[: len(offsets)]
        return self.device_lengths[:, None] + offsets

    def mask(self, rule: StepRule) -> Tensor | None:
        """BoolTensor [L, length + L], a view, or ragged [B, 1, L, width]; None for a single query
        that sees everything."""
        if self.device_lengths is not None:
            return rule.over_lengths(self.device_lengths, self._columns[: self.width])
        return rule.over_prefix(self.lengths[0]) if len(rule.offsets) > 1 else None

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write [B, H_kv, L, D] behind the kept tokens; return views [B, H_kv, length + L, D], or
        ragged [B, H_kv, width, D].

        Raises:
            ValueError: when the capacity is too small for rows of one length.
        """
        keys, values = self._keys[layer], self._values[layer]
        if self.device_lengths is not None:
            keys[self._rows, :, self._places] = key.transpose(1, 2)
            values[self._rows, :, self._places] = value.transpose(1, 2)
            return keys[:, :, : self.width], values[:, :, : self.width]
        start = self.lengths[0]
        end = start + key.shape[2]
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, {end} are needed")
        keys[:, :, start:end] = key
        values[:, :, start:end] = value
        return keys[:, :, :end], values[:, :, :end]

    def kept(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the kept tokens of rows of one length, [B, H_kv, length, D], views."""
        end = self.lengths[0]
        return self._keys[layer][:, :, :end], self._values[layer][:, :, :end]
