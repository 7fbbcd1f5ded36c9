"""The exact key-value cache: what plain autoregressive decoding would hold, and nothing else."""

import torch
from torch import Tensor

from pipeline.model.config import ModelConfig


class KVCache:
    """Preallocated keys and values of the tokens so far; [B, H_kv, capacity, D] for each layer.

    A forward writes its keys behind the kept ones (`extend`); afterwards `keep(n)` makes the first
    n of them permanent. What is not kept is simply overwritten by the next forward, so nothing is
    ever copied, and rejected drafts and mask tokens leave no trace.
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
        self._keys = [
            torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_layers)
        ]
        self._values = [torch.empty_like(key) for key in self._keys]

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
