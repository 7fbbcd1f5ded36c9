"""Timing variants side by side: interleaved rounds, medians, and ratios with their spread."""

import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Work = Callable[[], object]


@dataclass
class Samples:
    """What one variant took in each round."""

    wall_seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    """User and system time of this process and of child processes that have ended: what a busy
    machine disturbs least."""

    def summary(self) -> dict[str, Any]:
        return {"wall_seconds": spread(self.wall_seconds), "cpu_seconds": spread(self.cpu_seconds)}


def spread(values: list[float]) -> dict[str, float]:
    """Minimum, median and maximum."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def interleaved(
    variants: Mapping[str, Work], *, rounds: int, warmup: int, device: torch.device
) -> dict[str, Samples]:
    """Run every variant once a round (A B C A B C …), so that a slow spell hits all alike.

    `warmup` rounds come first and are not counted. On a GPU the clock stops when its work is done.
    """
    samples = {name: Samples() for name in variants}
    for number in range(warmup + rounds):
        for name, work in variants.items():
            wall, cpu = _clock(device)
            work()
            wall_end, cpu_end = _clock(device)
            if number >= warmup:
                samples[name].wall_seconds.append(wall_end - wall)
                samples[name].cpu_seconds.append(cpu_end - cpu)
    return samples


def _clock(device: torch.device) -> tuple[float, float]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return time.perf_counter(), sum(usage.ru_utime + usage.ru_stime for usage in usages)


def ratio(
    numerator: Samples,
    denominator: Samples,
    *,
    at_most: float | None = None,
    at_least: float | None = None,
) -> dict[str, Any]:
    """How many times as long `numerator` took: the ratio of medians, and the spread over rounds.

    Both by the clock and by CPU time. `at_most` or `at_least` is the target, kept for the reader.
    """
    result: dict[str, Any] = {
        clock: {
            "of_medians": statistics.median(above) / statistics.median(below),
            "per_round": spread([a / b for a, b in zip(above, below, strict=True)]),
        }
        for clock, above, below in (
            ("wall", numerator.wall_seconds, denominator.wall_seconds),
            ("cpu", numerator.cpu_seconds, denominator.cpu_seconds),
        )
    }
    targets = {"at_most": at_most, "at_least": at_least}
    return {**result, **{name: value for name, value in targets.items() if value is not None}}


def peak_bytes(work: Work, device: torch.device) -> int:
    """The most bytes that `work` holds at once in tensors, above what stood before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [event for event in events if event["name"] == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak
