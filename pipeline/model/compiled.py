"""What torch.compile is asked for: element-wise kernels on a GPU, and never to give up unseen.

A decoding step's element-wise operations each take a kernel of a few microseconds, about as long as
a matrix product of one token; compiled, those of a function take one.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

RECOMPILE_LIMIT = 64
"""Kinds of shapes that a function is compiled for."""


def fail_at_the_recompile_limit() -> None:
    """Have a function that meets more kinds of shapes than are compiled for raise, instead of
    running uncompiled from then on: FlexAttention without compilation holds all scores. Call it
    before the first compilation: it has no effect on a function that has met its limit."""
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    torch._dynamo.config.fail_on_recompile_limit_hit = True


class PointwiseKernel:
    """A function of tensors; compiled on CUDA, at its first call with new kinds of shapes.

    Where it cannot be compiled (no Triton, no C compiler) the function itself runs, after a
    warning: results are the same to rounding, steps are slower.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function
        self._compiled: Callable[..., Tensor] | None = None
        self._failed = False

    def __call__(self, *arguments: Any) -> Tensor:
        if self._failed or arguments[0].device.type != "cuda":
            return self._function(*arguments)
        return self.compiled(*arguments)

    def compiled(self, *arguments: Any) -> Tensor:
        """The result of the compiled function, on any device."""
        if self._compiled is None:
            self._compiled = torch.compile(self._function, dynamic=True)
        try:
            return self._compiled(*arguments)
        except torch._dynamo.exc.TorchDynamoException as error:
            # Compilation comes before anything is written, so the function may simply run.
            self._failed = True
            logging.getLogger(__name__).warning(
                "decoding runs uncompiled kernels: %s", str(error).strip().split("\n")[0]
            )
            return self._function(*arguments)
