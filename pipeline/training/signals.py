"""SIGTERM, SIGUSR1 and SIGINT ask a run to finish its step, save and leave."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_SAVED = 75
"""Exit code of a run that was asked to stop, saved, and can be continued (EX_TEMPFAIL)."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Whether this process was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.name: str | None = None

    def __bool__(self) -> bool:
        return self.name is not None


def code_for_launcher(code: int) -> int:
    """`code`, but under torchrun 0 for `EXIT_SAVED`.

    torchrun takes any other code for a crash: it ends with 1 and a long report, or, with
    `--max-restarts`, starts the workers again. There the file `interrupted` in the run directory
    tells a saved run from a finished one.
    """
    saved_under_torchrun = code == EXIT_SAVED and "TORCHELASTIC_RUN_ID" in os.environ
    return 0 if saved_under_torchrun else code


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Within the context the signals only set the request; afterwards they act as before."""
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        request.name = signal.Signals(number).name

    previous = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
