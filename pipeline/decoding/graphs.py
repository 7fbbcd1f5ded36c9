"""Decoding steps as CUDA graphs: a step is launched as one piece, not kernel by kernel.

A decoding step of a small batch runs a few hundred kernels of some microseconds each, and launching
them one by one takes longer than running them. A captured step is the same function on the same
tensors; what changes between steps (tokens, lengths, random numbers) is read from tensors that are
written in place.
"""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

WIDTH_STEP = 256
"""Captured steps look at a multiple of so many columns of the cache."""


class GraphedSteps:
    """Runs steps by key: the first of a key as it is, the second captured, all later replayed.

    The first run is a real step, and lets libraries allocate what must not be allocated while
    capturing. All graphs share one memory pool; they never run at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._warm: set[Hashable] = set()
        self._captured: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def __call__(self, key: Hashable, run: Callable[[], Tensor]) -> Tensor:
        """The result of `run`; after the first two calls with `key`, without calling it."""
        if key not in self._warm:
            self._warm.add(key)
            return self._aside(run)
        if key not in self._captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                result = run()
            self._captured[key] = (graph, result)
        graph, result = self._captured[key]
        graph.replay()
        return result

    def _aside(self, run: Callable[[], Tensor]) -> Tensor:
        """Run on the stream that captures, in order with the current one."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = run()
        current.wait_stream(self._stream)
        return result
