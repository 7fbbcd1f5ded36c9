"""Dropping a step whose loss or gradient is not finite, so that no trace of it is left."""

import math
from typing import Any

import torch


def is_plain(engine: Any) -> bool:
    """Whether torch's own optimizer runs without DeepSpeed around it: fp32 without ZeRO."""
    return not engine.zero_optimization() and not engine.bfloat16_enabled()


def discard_step(engine: Any) -> float:
    """Go past an accumulation boundary with weights and optimizer state as they were.

    All ranks call it, after the backward passes. Returns NaN, for the norm of the gradient.

    Under ZeRO DeepSpeed keeps gradients in buffers of its own and drops them itself when their
    norm is not finite, which a NaN in one of them makes sure of. Without ZeRO they are the
    parameters' own, which it forgets after a step: there the optimizer is kept from stepping.
    """
    optimizer = engine.optimizer
    if not engine.zero_optimization():
        step, optimizer.step = optimizer.step, _nothing
        try:
            engine.step()
        finally:
            optimizer.step = step
        return math.nan
    from deepspeed.utils import safe_set_full_grad

    parameter = next(p for p in engine.module.parameters() if p.requires_grad)
    parameter.grad = None  # or only this copy would be set, which DeepSpeed has taken in already
    whole = getattr(parameter, "_hp_grad", None)
    if whole is not None:  # bf16 under ZeRO 1: each rank takes the norm of its own whole copy
        whole.fill_(math.nan)
    else:
        shape = getattr(parameter, "ds_shape", parameter.shape)
        poison = torch.full(shape, math.nan, dtype=torch.float32, device=engine.device)
        safe_set_full_grad(parameter, poison)
    engine.step()
    return math.nan


def _nothing(*_: Any, **__: Any) -> None:
    """Stands in for an optimizer's step."""
