"""The layers of the decoder: attention with its cache, the feed-forward part, adapters on mask-slot
rows, and activation checkpointing. Letters: B batch, L tokens, E hidden size, H heads, D head size.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.model.attention import Mask, attend
from pipeline.model.config import ModelConfig
from pipeline.model.rotary import rotate


class LowRank(nn.Module):
    """An adapter, x [..., inputs] to B (A x) [..., outputs] (LoRA, arXiv 2106.09685, no scale).

    It is added to a projection's output on the rows of mask slots alone. Clean rows, verified
    drafts and the cache never see one, so the AR half of a model is, bit for bit, the model without
    them. `B` starts at zero: a model with new adapters is the model before.
    """

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


def adapter_for(config: ModelConfig, name: str, projection: nn.Linear) -> LowRank | None:
    """The adapter of the `projection` called `name`, None where the shape has none."""
    if not config.adapter_rank or name not in config.adapter_targets:
        return None
    return LowRank(projection.in_features, projection.out_features, config.adapter_rank)


def project(projection: nn.Module, adapter: LowRank | None, x: Tensor, clean: int | None) -> Tensor:
    """`projection` of all rows of `x` [B, L, inputs], with the adapter on the rows behind the first
    `clean`, as rows stand section by section; None has no slots. The projection itself always runs
    over all rows at once, so that clean rows round as they do without adapters."""
    out: Tensor = projection(x)
    if adapter is None or clean is None:
        return out
    if clean == 0:
        out += adapter(x)
        return out
    out[:, clean:] += adapter(x[:, clean:])
    return out


class Cache(Protocol):
    """What attention needs of a key-value cache (`pipeline.decoding.cache.KVCache`)."""

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values [B, H_kv, L, D] behind the kept ones; return all of them."""


class CleanPart:
    """One layer's keys and values of the clean section, which its mask section attends to: where
    the sections go through the model one after the other."""

    def __init__(self) -> None:
        self.kept: tuple[Tensor, Tensor] | None = None

    def join(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep those of the section that comes first; give the other all, [B, H_kv, S + M, D]."""
        if self.kept is None:
            self.kept = key, value
            return key, value
        return torch.cat([self.kept[0], key], dim=2), torch.cat([self.kept[1], value], dim=2)


def again_in_backward(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """Call `function`, keeping only `args` for the backward pass.

    It stops where the last saved tensor is there again, so a matrix product at the end is not
    repeated. Nothing in a model draws random numbers, so their state is not kept.
    """
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        query, key_value = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query, config.hidden_size, bias=False)
        self.q_adapter = adapter_for(config, "q_proj", self.q_proj)
        self.k_adapter = adapter_for(config, "k_proj", self.k_proj)
        self.v_adapter = adapter_for(config, "v_proj", self.v_proj)
        self.o_adapter = adapter_for(config, "o_proj", self.o_proj)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Mask,
        cache: Cache | CleanPart | None,
        clean: int | None,
    ) -> Tensor:
        batch, length, _ = x.shape
        heads = (batch, length, -1, self.head_dim)
        query = project(self.q_proj, self.q_adapter, x, clean).view(heads)
        key = project(self.k_proj, self.k_adapter, x, clean).view(heads)
        value = project(self.v_proj, self.v_adapter, x, clean).view(heads).transpose(1, 2)
        query, key = self.q_norm(query).transpose(1, 2), self.k_norm(key).transpose(1, 2)
        query, key = rotate(query, *rotary), rotate(key, *rotary)
        if isinstance(cache, CleanPart):  # compiled layers must not depend on their number
            key, value = cache.join(key, value)
        elif cache is not None:
            key, value = cache.extend(self.layer, key, value)
        mixed = attend(query, key, value, mask).transpose(1, 2).reshape(batch, length, -1)
        return project(self.o_proj, self.o_adapter, mixed, clean)


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.recompute = False
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.gate_adapter = adapter_for(config, "gate_proj", self.gate_proj)
        self.up_adapter = adapter_for(config, "up_proj", self.up_proj)
        self.down_adapter = adapter_for(config, "down_proj", self.down_proj)

    def forward(self, x: Tensor, clean: int | None) -> Tensor:
        gate = project(self.gate_proj, self.gate_adapter, x, clean)
        up = project(self.up_proj, self.up_adapter, x, clean)
        if self.recompute and self.training:
            return again_in_backward(self._down, gate, up, clean)
        return self._down(gate, up, clean)

    def _down(self, gate: Tensor, up: Tensor, clean: int | None) -> Tensor:
        return project(self.down_proj, self.down_adapter, F.silu(gate) * up, clean)


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Mask,
        cache: Cache | CleanPart | None,
        clean: int | None,
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, cache, clean)
        return x + self.mlp(self.post_attention_layernorm(x), clean)
