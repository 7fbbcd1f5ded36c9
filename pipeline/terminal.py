"""Text that a model writes, on stdout: coloured by forward in a terminal, calm when the reader
leaves."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator

from data_prep.errors import UserError

PALETTE = (39, 208, 78, 213, 220, 141)
"""Colours of successive forwards, of the 256 of a terminal; neighbours are easy to tell apart."""
RESET = "\x1b[0m"
EXIT_INTERRUPTED = 128 + signal.SIGINT


def use_colors(choice: str) -> bool:
    """What `auto`, `true` or `false` means here; `NO_COLOR` (no-color.org) and pipes want none."""
    choices = {"true": True, "false": False, "auto": None}
    if choice.lower() not in choices:  # Hydra makes True of true
        raise UserError(f"colors: unknown value {choice!r}; known are auto, true, false")
    chosen = choices[choice.lower()]
    if chosen is None:
        return sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return chosen


def write_text(text: str, number: int, colors: bool) -> None:
    """Show `text`, made by forward `number`, at once."""
    if colors and text:
        text = f"\x1b[38;5;{PALETTE[number % len(PALETTE)]}m{text}{RESET}"
    sys.stdout.write(text)
    sys.stdout.flush()


@contextlib.contextmanager
def reader_may_leave() -> Iterator[None]:
    """A context that ends quietly when the reader of stdout is gone (`| head`)."""
    try:
        yield
    except BrokenPipeError:
        # Python flushes stdout once more on exit; there is nobody left to read it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
