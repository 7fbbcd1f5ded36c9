"""Ends a job that hangs, with the stacks of all its ranks in the log.

Each rank says what it is at (`enter`); a thread looks at how long ago that was. The first rank
that has been at one thing for too long asks the others, through a file in the run directory, to
show their stacks as well; shortly afterwards all of them leave. A rank that hangs in native code
and never lets a Python thread run is ended by faulthandler's own timer, which needs no such thread.
"""

import faulthandler
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from pipeline.training.launch.signals import leave_code

EXIT_LOST = 4
"""Exit code of a run that ended because a rank hung or was lost; its last checkpoint is intact."""
ASKED = ".stacks-asked-for"
"""File in the run directory by which a rank that gave up asks all others for their stacks."""
DATA = "waiting for data"
STDERR = 2
"""The process's own, whatever stands for it in Python."""


@dataclass(frozen=True)
class WatchConfig:
    hang_timeout_s: float = 1800
    """Seconds that a rank may be at one step, save or eval before the job ends; 0 for ever."""
    data_stall_s: float = 60
    """Seconds of waiting for data that are reported, with rank and host; 0 never."""
    straggler_ratio: float = 1.5
    """A rank whose forwards take this many times the median over all ranks is reported; 0 never."""
    report_every: int = 50
    """Steps between the comparisons of ranks that these reports need."""

    def __post_init__(self) -> None:
        for key in ("hang_timeout_s", "data_stall_s", "straggler_ratio"):
            if (value := getattr(self, key)) < 0:
                raise ValueError(f"{key} must be 0 or more, got {value}")
        if self.report_every < 1:
            raise ValueError(f"report_every must be at least 1, got {self.report_every}")


class Watchdog:
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
        self.enter("starting")
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

    def enter(self, what: str) -> None:
        """This rank begins with `what`; the clock starts anew."""
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
        leave_code(EXIT_LOST)
        os._exit(EXIT_LOST)

    def _say(self, text: str) -> None:
        print(text, file=sys.__stderr__, flush=True)
