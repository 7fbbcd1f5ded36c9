"""Finding the rank that all others wait for.

In a synchronous step every rank takes the same time: the fast ones spend the rest of it waiting in
collectives. So what is compared is what each does alone: its forwards, and its waits for data.
Under ZeRO 3 a forward holds collectives too, and the comparison shows less.
"""

import socket
import statistics
import time
from typing import Any

import torch

from pipeline.distributed import World
from pipeline.training.guards.watchdog import WatchConfig
from pipeline.training.trackers.base import Event, make_event


class SlowRanks:
    """Collects times of this rank, and compares them with the others' now and then."""

    def __init__(self, module: torch.nn.Module, world: World, config: WatchConfig) -> None:
        self.world = world
        self.config = config
        self._on_gpu = world.device.type == "cuda"
        self._open: Any = None
        self._forwards: list[Any] = []
        self._longest_wait_s = 0.0
        if config.straggler_ratio and world.size > 1:
            module.register_forward_pre_hook(self._begin)
            module.register_forward_hook(self._end)

    def waited(self, seconds: float) -> None:
        """The wait for the data of a step."""
        self._longest_wait_s = max(self._longest_wait_s, seconds)

    def compare(self, step: int) -> list[Event]:
        """What is worth telling after `step`; all ranks call it, and it is mostly nothing."""
        if step % self.config.report_every:
            return []
        own = (socket.gethostname(), self._longest_wait_s, self._mean_forward_s())
        self._longest_wait_s = 0.0
        return find_slow(self.world.gather(own), self.config, step)

    def _begin(self, *_: Any) -> None:
        self._open = self._now()

    def _end(self, *_: Any) -> None:
        if self._open is not None:
            self._forwards.append((self._open, self._now()))
            self._open = None

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _mean_forward_s(self) -> float:
        spans, self._forwards = self._forwards, []
        if not spans:
            return 0.0
        if self._on_gpu:
            torch.cuda.synchronize()
            return statistics.fmean(begin.elapsed_time(end) for begin, end in spans) / 1e3
        return statistics.fmean(end - begin for begin, end in spans)


def find_slow(
    reports: list[tuple[str, float, float]], config: WatchConfig, step: int
) -> list[Event]:
    """Events for the ranks that stand out.

    Args:
        reports: by rank: its host, its longest wait for data and its mean forward, in seconds.
        config: what stands out.
        step: for the events.
    """
    events = []
    for rank, (host, wait_s, _) in enumerate(reports):
        if config.data_stall_s and wait_s > config.data_stall_s:
            text = f"rank {rank} on {host} waited {wait_s:.1f} s for the data of a step"
            events.append(make_event("data_stall", step, text, rank=rank, host=host, wait_s=wait_s))
    typical_s = statistics.median_low([forward_s for _, _, forward_s in reports])
    for rank, (host, _, forward_s) in enumerate(reports):
        ratio = forward_s / typical_s if typical_s else 0.0
        if config.straggler_ratio and ratio > config.straggler_ratio:
            text = f"rank {rank} on {host} is slow: its forwards take {ratio:.1f} times the median"
            details = {"rank": rank, "host": host, "forward_s": forward_s, "median_s": typical_s}
            events.append(make_event("straggler", step, text, **details))
    return events
