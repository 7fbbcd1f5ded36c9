"""The exact key-value cache: what plain autoregressive decoding would hold, and nothing else.

Letters: B rows of a batch, L new tokens, H_kv key heads, D head size.
"""

import torch
from torch import Tensor

from pipeline.decoding.step import StepRule
from pipeline.model.config import ModelConfig


class KVCache:
    """Preallocated keys and values of the tokens so far; [B, H_kv, capacity, D] for each layer.

    A forward writes its keys behind the kept ones (`extend`); afterwards `keep(n)` makes the first
    n of them permanent. What is not kept is simply overwritten by the next forward, so nothing is
    ever copied, and rejected drafts and mask tokens leave no trace. All rows have one length, which
    the host knows: reading is slicing.
    """

    def __init__(
        self,
        config: ModelConfig,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        batch_size: int = 1,
    ) -> None:
        shape = (batch_size, config.num_kv_heads, capacity, config.head_dim)
        self.capacity = capacity
        self.length = 0
        """Tokens kept."""
        # Zeros, not garbage: what a mask hides is multiplied by 0, and 0 · NaN is NaN.
        self._keys = [
            torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)
        ]
        self._values = [torch.zeros_like(key) for key in self._keys]

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write [B, H_kv, L, D] behind the kept tokens; return views [B, H_kv, length + L, D].

        Raises:
            ValueError: when the capacity is too small.
        """
        end = self.length + key.shape[2]
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, {end} are needed")
        keys, values = self._keys[layer], self._values[layer]
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        return keys[:, :, :end], values[:, :, :end]

    def keep(self, count: int) -> None:
        """Keep the first `count` tokens of the last forward."""
        self.length += count

    def kept(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the kept tokens, views [B, H_kv, length, D]."""
        return self._keys[layer][:, :, : self.length], self._values[layer][:, :, : self.length]

    def positions(self, offsets: Tensor) -> Tensor:
        """Positions of a step's queries, int64 [L], from their `offsets` to the first."""
        return offsets + self.length

    def mask(self, rule: StepRule) -> Tensor | None:
        """BoolTensor [L, length + L], a view; None for a single query, which sees everything."""
        return rule.over_prefix(self.length) if len(rule.offsets) > 1 else None


class RaggedCache:
    """A cache whose rows have lengths of their own, known on the device.

    Rows write at their own ends, and a mask hides what lies behind them. `width` columns take part
    in a forward: as many as the longest row needs, or a fixed number where shapes must not change
    (CUDA graphs).
    """

    def __init__(
        self,
        config: ModelConfig,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        batch_size: int,
    ) -> None:
        self._all = KVCache(config, capacity, dtype=dtype, device=device, batch_size=batch_size)
        self.capacity = capacity
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        """Tokens kept in each row, [B]."""
        self.width = capacity
        self._rows = torch.arange(batch_size, device=device)[:, None]
        self._columns = torch.arange(capacity, device=device)
        self._places = self.lengths[:, None]

    def row(self, number: int, length: int = 0) -> KVCache:
        """One row as a cache of its own, on the same memory; `length` tokens of it are kept."""
        view = KVCache.__new__(KVCache)
        view.capacity, view.length = self.capacity, length
        view._keys = [keys[number : number + 1] for keys in self._all._keys]
        view._values = [values[number : number + 1] for values in self._all._values]
        return view

    def positions(self, offsets: Tensor) -> Tensor:
        """Positions of a step's queries, int64 [B, L]; also where the forward will write."""
        self._places = self.lengths[:, None] + self._columns[: len(offsets)]
        return self.lengths[:, None] + offsets

    def mask(self, rule: StepRule) -> Tensor:
        """BoolTensor [B, 1, L, width]."""
        return rule.over_lengths(self.lengths, self._columns[: self.width])

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write [B, H_kv, L, D] behind each row's tokens; return views [B, H_kv, width, D]."""
        keys, values = self._all._keys[layer], self._all._values[layer]
        keys[self._rows, :, self._places] = key.transpose(1, 2)
        values[self._rows, :, self._places] = value.transpose(1, 2)
        return keys[:, :, : self.width], values[:, :, : self.width]

    def keep(self, counts: Tensor) -> None:
        """Keep the first `counts` [B] tokens of each row's last forward."""
        self.lengths += counts


Cache = KVCache | RaggedCache
