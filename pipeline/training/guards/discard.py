"""Keeping an update from the weights, so that no trace of its step is left."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Refuses = Callable[[float], bool]
"""Whether the update whose gradient has this norm is not to happen; alike on all ranks."""


def is_plain(engine: Any) -> bool:
    """Whether torch's own optimizer runs without DeepSpeed around it: fp32 without ZeRO."""
    return not engine.zero_optimization() and not engine.bfloat16_enabled()


def discard_step(engine: Any) -> float:
    """Go past an accumulation boundary with weights and optimizer state as they were.

    All ranks call it, after the backward passes. Returns NaN, for the norm of the gradient.
    """
    with updates_refused(engine):
        engine.step()
    return math.nan


@contextmanager
def updates_refused(engine: Any, refuses: Refuses | None = None) -> Iterator[None]:
    """Within the context `engine.step()` leaves weights and optimizer state as they are, where
    `refuses(norm)`, or always without it; everything else of the step happens as always.

    Only the call of torch's optimizer is left out, in which all of DeepSpeed's wrappers end,
    whatever buffers of the stage or of offloading hold the gradient. They take the global norm
    before it, which nobody has before `engine.step()`, and what they copy from masters to weights
    behind it is what was there. A plain optimizer has no norm: `refuses` is not for it.
    """
    wrapper = engine.optimizer
    inner = wrapper if is_plain(engine) else wrapper.optimizer
    update = inner.step

    def checked(*args: Any, **kwargs: Any) -> Any:
        if refuses is None:
            return None
        norm = wrapper._global_grad_norm
        if norm is not None and refuses(float(norm)):
            return None
        return update(*args, **kwargs)

    inner.step = checked
    try:
        yield
    finally:
        inner.step = update
