"""Text that a model writes, on stdout: coloured by forward in a terminal, calm when the reader
leaves."""

import contextlib
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from tidar_common.errors import UserError
from tidar_common.run_files import Exit

PALETTE = (39, 208, 78, 213, 220, 141)
"""Colours of successive forwards, of the 256 of a terminal; neighbours are easy to tell apart."""
RESET = "\x1b[0m"
EVERY_S = 10.0
"""Between two lines of progress."""


class Decoded(Protocol):
    """Tokens to text (`pipeline.decoding.text.TextStream`)."""

    def add(self, tokens: Iterable[int]) -> str: ...

    def end(self) -> str: ...


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


def show_steps(
    steps: Iterable[list[int]], decoded: Decoded, counts: list[int], colors: bool
) -> int:
    """Write the text as it comes, tokens of each forward into `counts`; the exit code."""
    code = 0
    try:
        for new in steps:
            counts.append(len(new))
            write_text(decoded.add(new), len(counts), colors)
    except KeyboardInterrupt:
        code = Exit.INTERRUPTED
    write_text(decoded.end(), len(counts), colors)
    write_text("\n", len(counts), colors=False)
    return code


def report(
    method: str, tokens: int, forwards: int, seconds: float, choices: Sequence[object] = ()
) -> None:
    """The summary; the prompt's forward counts, and its time too. And the steps chosen, if any.
    `method` may have the name of a share in front."""
    ratio = f"{tokens / max(forwards, 1):.2f} tokens per forward, {tokens / seconds:.1f} tokens/s"
    print(f"{method}: {tokens} tokens, {forwards} forwards, {ratio}", file=sys.stderr)
    for choice in choices:
        print(f"step chosen while decoding: {choice}", file=sys.stderr)


def histogram(counts: Sequence[int]) -> str:
    """How often a forward gave 1, 2, … tokens; `counts` are those of each forward."""
    often = Counter(counts)
    parts = [f"{size}: {often[size]}×" for size in sorted(often)]
    return f"tokens a forward: {', '.join(parts)}"


@contextlib.contextmanager
def prompts_progress(name: str) -> Iterator[Callable[[int, int, int], None]]:
    """How far many prompts are, on stderr; moved by calls with the numbers done and of all, and the
    new tokens. A bar in a terminal; elsewhere, and for one of several processes, a line every
    `EVERY_S` seconds that begins with `name`."""
    console = Console(stderr=True)
    if not console.is_terminal or name:
        yield ProgressLines(name).advance
        return
    with Progress(
        TextColumn("prompts {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=console,
    ) as bar:
        task, started = bar.add_task("", total=None, rate=""), time.monotonic()

        def advance(done: int, total: int, tokens: int) -> None:
            rate = f"{tokens / max(time.monotonic() - started, 1e-9):,.0f} tokens/s"
            bar.update(task, completed=done, total=total, rate=rate)

        yield advance


class ProgressLines:
    """Says how far it is, in a line from time to time."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._started = self._last = time.monotonic()
        self._first: int | None = None

    def advance(self, done: int, total: int, tokens: int) -> None:
        """Prompts done and of all, and new tokens since the start; prints when it is time."""
        now = time.monotonic()
        if self._first is None:  # where this run begins; before that, an interrupted one was
            self._first, self._started = done, now
        if now - self._last < EVERY_S:
            return
        self._last, seconds = now, max(now - self._started, 1e-9)
        line = f"{self._name}prompts {done:,}/{total:,}, {tokens / seconds:,.0f} tokens/s"
        if done > self._first:
            left = seconds * (total - done) / (done - self._first)
            line += f", {timedelta(seconds=round(left))} left"
        print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def reader_may_leave() -> Iterator[None]:
    """A context that ends quietly when the reader of stdout is gone (`| head`)."""
    try:
        yield
    except BrokenPipeError:
        # Python flushes stdout once more on exit; there is nobody left to read it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
