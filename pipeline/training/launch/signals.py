"""What asks a run to finish its step, save and leave: a signal, a time limit, a lost launcher."""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from types import FrameType

from tidar_common.errors import UserError
from tidar_common.run_files import Exit

AGAIN_S = 2.0
"""A launcher passes the terminal's Ctrl-C on at once: only a later one is the user's second."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
UNDER_TORCHRUN = "TORCHELASTIC_RUN_ID"
EXIT_CODE_FILE = "TIDAR_EXIT_CODE_FILE"
SLURM_END = "SLURM_JOB_END_TIME"
"""Set by Slurm in every job: when its time limit is reached, in seconds since the epoch."""
UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class StopRequest:
    """Whether this process should stop, and why. Asked once a step; a request stays.

    Args:
        deadline: seconds since the epoch after which no step begins; None for no limit.
    """

    def __init__(self, deadline: float | None = None) -> None:
        self.name: str | None = None
        self.deadline = deadline
        self.newest: Callable[[], str | None] = lambda: None
        """Name of the checkpoint that is left to who leaves without another; set by the run."""
        self._interrupted: float | None = None
        # torchrun starts its workers in sessions of their own: one that is killed leaves them
        # behind, where nobody sees them and a restart would run beside them.
        self._launcher = os.getppid() if UNDER_TORCHRUN in os.environ else None

    def __bool__(self) -> bool:
        if self.name is None and self.deadline is not None and time.time() >= self.deadline:
            self.name = "the time limit of stop_before"
        if self.name is None and self._launcher not in (None, os.getppid()):
            self.name = f"torchrun, process {self._launcher}, is gone"
        return self.name is not None

    def note(self, number: int, frame: FrameType | None) -> None:
        """A signal came: say so at once, and at a second Ctrl-C leave."""
        name, now = signal.Signals(number).name, time.monotonic()
        if number == signal.SIGINT:
            if self._interrupted is not None and now - self._interrupted >= AGAIN_S:
                tell(f"{name} again: left at once; what came after "
                     f"{self.newest() or 'the start'} is lost, and the same command continues "
                     "from there")  # fmt: skip
                # Threads and processes of libraries would hold up an orderly end.
                os._exit(Exit.INTERRUPTED)
            self._interrupted = self._interrupted or now
        # Set first: another signal may come before this one's line is written.
        before, self.name = self.name, name
        if before is None:
            again = "; Ctrl-C again leaves at once" if number == signal.SIGINT else ""
            tell(f"{name}: finishing what is at hand, then saving{again}")


def tell(text: str) -> None:
    """A line on rank 0's stderr, past buffers in which a signal may have interrupted a write."""
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            os.write(2, f"{text}\n".encode())


def code_for_launcher(code: int) -> int:
    """`code`, but under torchrun 0 for `Exit.SAVED`.

    torchrun takes any other code for a crash: it ends with 1 and a long report, or, with
    `--max-restarts`, starts the workers again. There the file `interrupted` in the run directory
    tells a saved run from a finished one.
    """
    saved_under_torchrun = code == Exit.SAVED and UNDER_TORCHRUN in os.environ
    return 0 if saved_under_torchrun else code


def leave_code(code: int) -> None:
    """Leave this process's exit code in the file that `TIDAR_EXIT_CODE_FILE` names, if it does.

    For launchers that, as torchrun, end with 1 whatever code a rank ended with. The first rank to
    end tells; the rest are often ended by torchrun because of it.
    """
    file = os.environ.get(EXIT_CODE_FILE)
    if file:
        with suppress(OSError), open(file, "x") as target:
            target.write(str(code))


@contextmanager
def stop_on_signal(deadline: float | None = None) -> Iterator[StopRequest]:
    """Within the context the signals only set the request; afterwards they act as before."""
    request = StopRequest(deadline)
    previous = {number: signal.signal(number, request.note) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def deadline(stop_before: str | None, margin_s: float) -> float | None:
    """When the last step has to be done, in seconds since the epoch; None for no limit.

    Args:
        stop_before: `auto` (Slurm's limit where there is one), null, a length of time from now
            such as `90m` or `1d12h`, or a moment such as `2026-01-31T18:00`.
        margin_s: seconds before it that are left for the last step and its save. At most half of
            the time that is left now: a limit that is too short must not stop every start before
            its first step.
    """
    now = time.time()
    limit = _limit(stop_before, now)
    if limit is None:
        return None
    return limit - min(margin_s, max(limit - now, 0.0) / 2)


def _limit(stop_before: str | None, now: float) -> float | None:
    if stop_before is None:
        return None
    if stop_before == "auto":
        end = os.environ.get(SLURM_END, "")
        return float(end) if end.isdigit() else None
    if re.fullmatch(r"(\d+[smhd])+", stop_before):
        return now + sum(
            int(number) * UNITS_S[unit]
            for number, unit in re.findall(r"(\d+)([smhd])", stop_before)
        )
    try:
        moment = datetime.fromisoformat(stop_before).timestamp()
    except ValueError as error:
        raise UserError(
            f"stop_before: {stop_before!r} is no time; give auto, null, a length such as 90m or "
            "1d12h, or a moment such as 2026-01-31T18:00"
        ) from error
    if moment <= now:
        raise UserError(f"stop_before: {stop_before} is over; give a later moment")
    return moment
