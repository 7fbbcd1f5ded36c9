"""`report.html` while a run trains, drawn by `tidar-status --report` in a process beside it.

Training never waits for a page, but for the last one: that is there when the command ends.
"""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from pipeline.data.order import TrainState
from pipeline.training.moments import StepMetrics, Tracker
from tidar_common.run_files import METRICS

LIMIT_S = 300
"""A process that draws ends itself after so long, also where nobody is left to end it."""
NICE = 10
"""How far a drawing process stands back behind training."""
DRAW = """
import os, runpy, signal, sys
limit, nice = map(int, sys.argv[1:3])
del sys.argv[1:3]
for request in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):  # sent to all, meant for training
    signal.signal(request, signal.SIG_IGN)
signal.signal(signal.SIGALRM, lambda *_: sys.exit(f"it took more than {limit} s"))
signal.alarm(limit)
os.nice(nice)
runpy.run_module("pipeline.status", run_name="__main__", alter_sys=True)
"""


class Report(Tracker):
    """Draws the page after each eval and at the end, one process at a time.

    A page that cannot be drawn is said so and ends no training.
    """

    def __init__(
        self,
        run_dir: Path,
        say: Callable[[str], None],
        limit_s: int = LIMIT_S,
        nice: int = NICE,
    ) -> None:
        self.run_dir = run_dir
        self.say = say
        self.limit_s = limit_s
        self.nice = nice
        self.drawing: subprocess.Popen[bytes] | None = None
        self.errors: IO[bytes]
        """What that process says; a file, as a pipe that nobody reads yet could fill up."""
        self.outdated = False
        """Whether there is an eval that no process has been started for."""

    def on_eval(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.outdated = True
        self._go_on()

    def on_step(self, metrics: StepMetrics) -> None:
        self._go_on()

    def on_end(self, state: TrainState, finished: bool) -> None:
        if self.drawing is not None:  # it stands back, and its page is of an earlier step
            self.drawing.send_signal(signal.SIGALRM)
            self._wait(self.drawing)
        metrics = self.run_dir / METRICS
        if metrics.exists() and metrics.stat().st_size:  # a run stopped before its first step
            self._start(nice=0)
            self._finish()

    def _go_on(self) -> None:
        if self.drawing is not None and self.drawing.poll() is not None:
            self._finish()
        if self.outdated and self.drawing is None:
            self._start(self.nice)

    def _start(self, nice: int) -> None:
        command = [sys.executable, "-c", DRAW, str(self.limit_s), str(nice), "--report"]
        self.outdated = False
        try:
            self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed when it is read
            self.drawing = subprocess.Popen(
                [*command, str(self.run_dir)], env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self.errors,
            )  # fmt: skip
        except OSError as error:
            self._warn(str(error))

    def _finish(self) -> None:
        """Wait for the process, if there is one, and say what kept it from drawing."""
        reason = self._wait(self.drawing) if self.drawing is not None else None
        if reason is not None:
            self._warn(reason)

    def _wait(self, drawing: subprocess.Popen[bytes]) -> str | None:
        """Its last line on stderr, where it did not end well."""
        code, self.drawing = drawing.wait(), None
        with self.errors:
            self.errors.seek(0)
            last = self.errors.read().decode(errors="replace").strip().split("\n")[-1]
        return None if code == 0 else last.removeprefix("error: ") or f"it ended with {code}"

    def _warn(self, reason: str) -> None:
        self.say(
            f"warning: report.html could not be written ({reason}); training goes on, and "
            f"tidar-status {self.run_dir} --report draws it later"
        )
