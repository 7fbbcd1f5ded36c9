"""Ranks that hang, and ranks that all others wait for.

A job that hangs is ended, with the stacks of all its ranks in the log. Each rank says what it is at
(`on_phase`); a thread looks at how long ago that was. The first rank that has been at one thing for
too long asks the others, through a file in the run directory, to show their stacks as well; shortly
afterwards all of them leave. A rank that hangs in native code and never lets a Python thread run is
ended by faulthandler's own timer, which needs no such thread.
"""

import faulthandler
import os
import socket
import statistics
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from pipeline.distributed import World
from pipeline.training.config import WatchConfig
from pipeline.training.launch.signals import leave_code
from pipeline.training.moments import DATA, Event, Guard, make_event
from pipeline.training.step import StepDone
from tidar_common.run_files import Exit

ASKED = ".stacks-asked-for"
"""File in the run directory by which a rank that gave up asks all others for their stacks."""
STDERR = 2
"""The process's own, whatever stands for it in Python."""


class Watchdog(Guard):
    """Watches this rank within a `with` block.

    Args:
        run_dir: of the run, on a file system that all ranks see.
        rank: of this process.
        config: the times.
        grace_s: between the first stacks and the end, for the stacks of the other ranks.
    """

    def __init__(self, run_dir: Path, rank: int, config: WatchConfig, grace_s: float = 5.0) -> None:
        self.config = config
        self.grace_s = grace_s
        self.who = f"rank {rank} on {socket.gethostname()}"
        self._asked = run_dir / ASKED
        self._is_main = rank == 0
        self._at = ("starting", time.monotonic())
        self._stall_told = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="tidar-watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._is_main:
            self._asked.unlink(missing_ok=True)
        self.on_phase("starting")
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()
        if self.config.hang_timeout_s:
            faulthandler.cancel_dump_traceback_later()

    def on_phase(self, what: str) -> None:
        """The clock starts anew."""
        self._at = (what, time.monotonic())
        self._stall_told = False
        if self.config.hang_timeout_s:
            patience_s = self.config.hang_timeout_s + 2 * self.grace_s
            faulthandler.dump_traceback_later(patience_s, exit=True, file=STDERR)

    def _watch(self) -> None:
        limits = [s for s in (self.config.hang_timeout_s, self.config.data_stall_s) if s]
        pause_s = min([1.0, *(limit / 4 for limit in limits)])
        while not self._ended.wait(pause_s):
            what, since = self._at
            waited_s = time.monotonic() - since
            stall_s = self.config.data_stall_s
            if what == DATA and stall_s and waited_s > stall_s and not self._stall_told:
                self._stall_told = True
                self._say(f"warning: {self.who} has waited {waited_s:.0f} s for data")
            hang_s = self.config.hang_timeout_s
            if hang_s and waited_s > hang_s:
                self._give_up(f"{self.who} has been {what} for {waited_s:.0f} s")
            if hang_s and waited_s > self.grace_s and self._asked.exists():
                self._give_up(f"{self.who} is {what}; another rank hangs")

    def _give_up(self, text: str) -> None:
        if self._ended.is_set():
            return
        try:
            self._asked.touch()
        except OSError as error:
            self._say(f"warning: the other ranks cannot be asked for their stacks ({error})")
        self._say(
            f"error: {text} (watch.hang_timeout_s={self.config.hang_timeout_s:g}); the job ends, "
            "the last checkpoint is intact, and the same command continues; stacks follow"
        )
        faulthandler.dump_traceback(file=STDERR, all_threads=True)
        time.sleep(self.grace_s)
        leave_code(Exit.LOST)
        os._exit(Exit.LOST)

    def _say(self, text: str) -> None:
        print(text, file=sys.__stderr__, flush=True)


class SlowRanks(Guard):
    """Finds the rank that all others wait for.

    In a synchronous step every rank takes the same time: the fast ones spend the rest of it waiting
    in collectives. So what is compared, now and then, is what each does alone: its forwards, and
    its waits for data. Under ZeRO 3 a forward holds collectives too, and the comparison shows less.
    """

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

    def after_step(self, done: StepDone) -> None:
        self._longest_wait_s = max(self._longest_wait_s, done.waited)
        if done.step % self.config.report_every == 0:
            times = (socket.gethostname(), self._longest_wait_s, self._mean_forward_s())
            self._longest_wait_s = 0.0
            for event in find_slow(self.world.gather(times), self.config, done.step):
                self.report(event)

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
