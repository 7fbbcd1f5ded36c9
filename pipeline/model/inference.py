"""The forward of decoding: the same numbers as `Transformer.hidden` to rounding, in fewer kernels.

A decoding step of a small batch is bound by reading weights and by the number of kernels. So the
three projections of attention are one matrix product, and the two of the feed-forward part another;
residual additions happen inside the products that feed them; rotary positions are looked up in a
table; keys and values are written together; the mask is one additive bias for all layers. Weights
are not held twice: the joined matrices are the memory that the model's own parameters live in.

Adapters act on slot rows alone, as in training: clean rows do not depend on whether they are there.
Letters: B batch, L tokens, E hidden size, H query heads, H_kv key heads, G = H / H_kv, D head size,
W cached columns, N = H + 2 H_kv, V vocabulary, r rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.model.attention import attend_folded, causal_bias, fold_bias, fused_backend
from pipeline.model.compiled import PointwiseKernel
from pipeline.model.layers import DecoderLayer, LowRank
from pipeline.model.rotary import rotary_table


class StepCache(Protocol):
    """What this forward needs of a key-value cache (`pipeline.decoding.cache.KVCache`)."""

    places: tuple[Tensor, Tensor] | None
    """Rows [B, 1] and columns [B, L] where the forward writes; None where `write` knows."""

    def layer(self, number: int) -> Tensor:
        """Keys and values of a layer, [2, B, H_kv, capacity, D]."""

    def write(self, number: int, new: Tensor) -> None:
        """Write [B, L, 2, H_kv, D] behind the kept tokens."""

    def seen(self, number: int, queries: int) -> tuple[Tensor, Tensor]:
        """Keys and values that a forward of so many queries attends to, [B, H_kv, W, D] each."""


def _rotate(qkv: Tensor, table: Tensor) -> Tensor:
    """Rotary positions for all heads of `qkv` [B, L, N, D]; `table` is [B or 1, L, N, 2, D]. Those
    of values have cosine 1 and sine 0."""
    first, second = qkv.chunk(2, dim=-1)
    return torch.addcmul(
        qkv * table[..., 0, :], torch.cat([second, first], dim=-1), table[..., 1, :]
    )


def _rotate_and_write(
    qkv: Tensor, table: Tensor, kept: Tensor, rows: Tensor, columns: Tensor, heads: int
) -> Tensor:
    """The rotated queries [B, L, H, D]; keys and values go to `kept` [2, B, H_kv, capacity, D]."""
    rotated = _rotate(qkv, table)
    kept[:, rows, :, columns] = rotated[:, :, heads:].unflatten(2, (2, -1))
    return rotated[:, :, :heads]


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


rotate_and_write = PointwiseKernel(_rotate_and_write)
swiglu = PointwiseKernel(_swiglu)


@dataclass(frozen=True)
class _Joined:
    """Several projections of one input as one matrix product."""

    weight: Tensor
    """[outputs, inputs]"""
    bias: Tensor | None
    down: Tensor | None
    """The adapters' first matrices, [inputs, ranks]; None where there are none."""
    up: Tensor | None
    """Their second ones, each in the columns of its projection, [ranks, outputs]."""

    @classmethod
    def of(cls, projections: Sequence[nn.Linear], adapters: Sequence[LowRank | None]) -> "_Joined":
        weight = joined([projection.weight for projection in projections])
        biases = [p.bias for p in projections if p.bias is not None]
        return cls(weight, joined(biases) if biases else None, *_low_rank(projections, adapters))

    def __call__(self, x: Tensor, clean: int | None) -> Tensor:
        """`x` [B, L, inputs] to [B, L, outputs]."""
        out = F.linear(x, self.weight, self.bias)
        return self._adapt(out, x, clean)

    def add_to(self, total: Tensor, x: Tensor, clean: int | None) -> None:
        """The same, added to `total` [B, L, outputs] in place; without a bias."""
        total.flatten(0, 1).addmm_(x.flatten(0, 1), self.weight.T)
        self._adapt(total, x, clean)

    def _adapt(self, out: Tensor, x: Tensor, clean: int | None) -> Tensor:
        if self.down is None or self.up is None or clean is None or clean == x.shape[1]:
            return out
        low = x[:, clean:] @ self.down
        if len(x) == 1:
            out[0, clean:].addmm_(low[0], self.up)
        else:
            out[:, clean:] += low @ self.up
        return out


def joined(parameters: Sequence[Tensor]) -> Tensor:
    """The parameters one below the other, [sum of rows, ...], as one tensor on their own memory.

    Where they do not stand one behind the other yet, they are moved there: their values, shapes and
    names stay as they are.
    """
    first, rows = parameters[0], sum(len(parameter) for parameter in parameters)
    shape, end = (rows, *first.shape[1:]), first.data_ptr()
    adjacent = len({p.untyped_storage().data_ptr() for p in parameters}) == 1
    for parameter in parameters:
        adjacent = adjacent and parameter.is_contiguous() and parameter.data_ptr() == end
        end += parameter.numel() * parameter.element_size()
    # Memory of the kind that it replaces: a model may have been made in inference mode.
    with torch.inference_mode(first.is_inference()), torch.no_grad():
        if adjacent:
            return first.detach().as_strided(shape, first.stride())
        memory = torch.cat([parameter.detach() for parameter in parameters])
        parts = memory.split([len(parameter) for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.data = part
        return memory


def _low_rank(
    projections: Sequence[nn.Linear], adapters: Sequence[LowRank | None]
) -> tuple[Tensor | None, Tensor | None]:
    there = [adapter for adapter in adapters if adapter is not None]
    if not there:
        return None, None
    down = torch.cat([adapter.down.weight.detach() for adapter in there]).T.contiguous()
    up = down.new_zeros(down.shape[1], sum(p.out_features for p in projections))
    row = column = 0
    for projection, adapter in zip(projections, adapters, strict=True):
        if adapter is not None:
            part = adapter.up.weight.detach().T
            up[row : row + len(part), column : column + projection.out_features] = part
            row += len(part)
        column += projection.out_features
    return down, up


class _Layer:
    def __init__(self, layer: DecoderLayer) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.before, self.between = layer.input_layernorm, layer.post_attention_layernorm
        self.qkv = _Joined.of(
            [attention.q_proj, attention.k_proj, attention.v_proj],
            [attention.q_adapter, attention.k_adapter, attention.v_adapter],
        )
        self.output = _Joined.of([attention.o_proj], [attention.o_adapter])
        self.gate_up = _Joined.of([mlp.gate_proj, mlp.up_proj], [mlp.gate_adapter, mlp.up_adapter])
        self.down = _Joined.of([mlp.down_proj], [mlp.down_adapter])
        self.head_norms: Tensor | None = None
        """Weights of the norms of queries and keys, [H + H_kv, D]; None without."""
        self.eps: float | None = None
        if isinstance(attention.q_norm, nn.RMSNorm) and isinstance(attention.k_norm, nn.RMSNorm):
            size = attention.head_dim
            counts = (attention.q_proj.out_features // size, attention.k_proj.out_features // size)
            weights = [attention.q_norm.weight.detach(), attention.k_norm.weight.detach()]
            self.head_norms = torch.cat(
                [w.expand(count, -1) for w, count in zip(weights, counts, strict=True)]
            )
            self.eps = attention.q_norm.eps


class DecodingForward:
    """A `Transformer` in evaluation mode as decoding runs it; made anew when its weights change."""

    def __init__(self, model: Any, positions: int) -> None:
        """`positions` are all that a query will ever stand at: 0 … positions - 1."""
        config, decoder = model.config, model.model
        first = decoder.embed_tokens.weight
        self.model, self.heads = model, config.num_heads
        self.key_heads, self.head_dim = config.num_kv_heads, config.head_dim
        self.layers = [_Layer(layer) for layer in decoder.layers]
        where = torch.arange(positions, device=first.device)
        cosine, sine = rotary_table(
            where, self.head_dim, config.rope_theta, first.dtype, config.rope_scaling
        )
        signed = sine[0, 0].clone()
        signed[:, : self.head_dim // 2].neg_()
        turning = torch.stack([cosine[0, 0], signed], dim=1)
        still = torch.zeros_like(turning)
        still[:, 0] = 1.0
        self._table = torch.stack([turning, still], dim=1)
        """Cosines and signed sines, of queries and keys and of values, [positions, 2, 2, D]."""
        kinds = [0] * (self.heads + self.key_heads) + [1] * self.key_heads
        self._kinds = torch.tensor(kinds, device=first.device)
        self.backend = fused_backend(first.device, first.dtype, self.head_dim)
        """The kernel of attention: what `scaled_dot_product_attention` may use, by name."""

    def hidden(
        self,
        input_ids: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        cache: StepCache,
        clean: int | None = None,
    ) -> Tensor:
        """Final hidden states [B, L, E] of tokens [B, L] at `positions` [B, L] or [L].

        Args:
            input_ids: int64.
            positions: int64.
            mask: added to the scores, of the model's type, broadcasting to [B, 1, L, W]: 0, or -inf
                where a query may not attend. None is causal, the last query at the last key.
            cache: extended in place.
            clean: the rows behind the first so many are mask slots; None is no slots.
        """
        batch, length = input_ids.shape
        clean = None if clean is None or clean >= length else clean
        x = self.model.model.embed_tokens(input_ids)
        if clean is not None and self.model.model.mask_embedding is not None:
            x[:, clean:] = self.model.model._slots(input_ids[:, clean:], x[:, clean:])
        table = self._table[positions[..., None], self._kinds]
        table = table if table.ndim == 5 else table[None]
        bias = None if mask is None else fold_bias(mask, batch, self.key_heads)
        for number, layer in enumerate(self.layers):
            query = self._extend(number, layer, x, table, cache, clean)
            keys, values = cache.seen(number, length)
            if bias is None and length > 1:
                bias = causal_bias(length, keys.shape[2] - length, x.device, x.dtype)
            mixed = attend_folded(query, keys, values, bias, self.backend)
            layer.output.add_to(x, mixed, clean)
            inner = swiglu(layer.gate_up(layer.between(x), clean))
            layer.down.add_to(x, inner, clean)
        hidden: Tensor = self.model.model.norm(x)
        return hidden

    def _extend(
        self,
        number: int,
        layer: _Layer,
        x: Tensor,
        table: Tensor,
        cache: StepCache,
        clean: int | None,
    ) -> Tensor:
        """Rotated queries [B, L, H, D]; keys and values go into the cache."""
        qkv = layer.qkv(layer.before(x), clean).unflatten(2, (-1, self.head_dim))
        if layer.head_norms is not None:
            both = qkv[:, :, : len(layer.head_norms)]
            torch.mul(F.rms_norm(both, both.shape[-1:], eps=layer.eps), layer.head_norms, out=both)
        if cache.places is not None:
            kept = cache.layer(number)
            return rotate_and_write(qkv, table, kept, *cache.places, self.heads)
        rotated = _rotate(qkv, table)
        cache.write(number, rotated[:, :, self.heads :].unflatten(2, (2, -1)))
        return rotated[:, :, : self.heads]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of final hidden states [..., E], to choose tokens by."""
        logits: Tensor = self.model.lm_head.logits_to_choose_by(hidden)
        return logits
