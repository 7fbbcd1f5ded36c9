"""Writing into parameters that may be cut up over the processes."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

Opening = Callable[[nn.Parameter], AbstractContextManager[bool]]
"""Makes a parameter whole while the context lasts, and says whether this process is to write it.
With ZeRO 3 that takes all ranks, and one of them writes for all."""


@contextmanager
def whole(parameter: nn.Parameter) -> Iterator[bool]:
    """`Opening` of a parameter that every process holds whole, and writes itself."""
    yield True


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of `parameter` even where ZeRO 3 has cut it up."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
