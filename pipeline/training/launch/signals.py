"""What asks a run to finish its step, save and leave: a signal, a time limit, a lost launcher."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

EXIT_SAVED = 75
"""Exit code of a run that was asked to stop, saved, and can be continued (EX_TEMPFAIL)."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
UNDER_TORCHRUN = "TORCHELASTIC_RUN_ID"
EXIT_CODE_FILE = "TIDAR_EXIT_CODE_FILE"


class StopRequest:
    """Whether this process should stop, and why. Asked once a step; a request stays.

    Args:
        deadline: seconds since the epoch after which no step begins; None for no limit.
    """

    def __init__(self, deadline: float | None = None) -> None:
        self.name: str | None = None
        self.deadline = deadline
        # torchrun starts its workers in sessions of their own: one that is killed leaves them
        # behind, where nobody sees them and a restart would run beside them.
        self._launcher = os.getppid() if UNDER_TORCHRUN in os.environ else None

    def __bool__(self) -> bool:
        if self.name is None and self.deadline is not None and time.time() >= self.deadline:
            self.name = "the time limit of stop_before"
        if self.name is None and self._launcher not in (None, os.getppid()):
            self.name = f"torchrun, process {self._launcher}, is gone"
        return self.name is not None


def code_for_launcher(code: int) -> int:
    """`code`, but under torchrun 0 for `EXIT_SAVED`.

    torchrun takes any other code for a crash: it ends with 1 and a long report, or, with
    `--max-restarts`, starts the workers again. There the file `interrupted` in the run directory
    tells a saved run from a finished one.
    """
    saved_under_torchrun = code == EXIT_SAVED and UNDER_TORCHRUN in os.environ
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

    def note(number: int, frame: FrameType | None) -> None:
        request.name = signal.Signals(number).name

    previous = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
