"""Rotary positions, and the ways in which their frequencies are stretched for longer texts.

The formulas are those of transformers' `modeling_rope_utils`, against which they are tested.
Letters: B batch, H heads, L tokens, D head size.
"""

import math
from typing import Any

import torch
from torch import Tensor

from pipeline.model.config import KIND


def rotary_table(
    position_ids: Tensor,
    head_dim: int,
    theta: float,
    dtype: torch.dtype,
    scaling: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B or 1, 1, L, D] for `position_ids` [B, L] or [L], computed in fp32."""
    frequency, factor = frequencies(head_dim, theta, scaling, position_ids.device)
    angle = position_ids.float()[..., None] * frequency
    angle = torch.cat([angle, angle], dim=-1)
    if angle.ndim == 2:
        angle = angle[None]
    return (angle.cos() * factor)[:, None].to(dtype), (angle.sin() * factor)[:, None].to(dtype)


def frequencies(
    head_dim: int, theta: float, scaling: dict[str, Any] | None, device: torch.device
) -> tuple[Tensor, float]:
    """Radians a position, fp32 [D / 2], and the factor on cosines and sines."""
    exponent = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)
    plain = theta ** (-exponent / head_dim)
    if scaling is None:
        return plain, 1.0
    if scaling[KIND] == "linear":
        return plain / scaling["factor"], 1.0
    if scaling[KIND] == "llama3":
        return _llama3(plain, scaling), 1.0
    return _yarn(plain, head_dim, theta, scaling)


def _llama3(plain: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Long waves are stretched, short ones kept, those between in proportion."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    waves = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)
    kept = ((waves - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * plain / scaling["factor"] + kept * plain


def _yarn(
    plain: Tensor, head_dim: int, theta: float, scaling: dict[str, Any]
) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071): as above by dimension instead of wave, and sharper attention."""
    length, factor = scaling["original_max_position_embeddings"], scaling["factor"]

    def dimension(turns: float) -> float:
        # Whose wave turns so often within the original length.
        return head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(dimension(scaling.get("beta_fast") or 32)), 0)
    last = min(math.ceil(dimension(scaling.get("beta_slow") or 1)), head_dim - 1)
    index = torch.arange(head_dim // 2, device=plain.device, dtype=torch.float32)
    stretched = ((index - first) / max(last - first, 0.001)).clamp(0, 1)
    attention = scaling.get("attention_factor")
    if attention is None:
        attention = 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0
    return stretched * plain / factor + (1 - stretched) * plain, attention


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Apply rotary positions to `x` [B, H, L, D]; halves are paired as in Hugging Face's models."""
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-second, first], dim=-1) * sine
