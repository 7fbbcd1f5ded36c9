"""A model's parameters by name: which of them only draft, their order in the optimizer, and writing
into those that may be cut up over the processes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

MASK_EMBEDDING = "model.mask_embedding"
DRAFT_HEAD = "draft_head."
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


def is_drafting(name: str) -> bool:
    """Whether the parameter `name` is used for drafting alone: an adapter's, the mask slots' own
    embedding, or the draft head's. All others are the base model's."""
    return name == MASK_EMBEDDING or is_of_head(name) or is_adapter(name)


def is_adapter(name: str) -> bool:
    return "_adapter." in name


def is_of_head(name: str) -> bool:
    return name.startswith(DRAFT_HEAD)


def divide(shapes: Sequence[tuple[str, torch.Size]]) -> tuple[list[str], list[str], list[str]]:
    """Names of the base's matrices, of its norms and biases, and of what only drafts, from named
    `shapes`; the order of the optimizer's parameters."""
    base = [(name, shape) for name, shape in shapes if not is_drafting(name)]
    matrices = [name for name, shape in base if len(shape) >= 2]
    rest = [name for name, shape in base if len(shape) < 2]
    return matrices, rest, [name for name, _ in shapes if is_drafting(name)]


def initial_value(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """How an adapter's weight, or the mask slots' own embedding, starts: fp32 on the CPU."""
    value = torch.zeros(shape, dtype=torch.float32)
    if name.endswith(".up.weight"):
        return value
    deviation = 1 / math.sqrt(shape[1]) if is_adapter(name) else 0.02
    return value.normal_(0.0, deviation, generator=generator)
