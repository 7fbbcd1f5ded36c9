"""Text that a model writes, on stdout: coloured by forward in a terminal, calm when the reader
leaves."""

import contextlib
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from data_prep.errors import UserError

PALETTE = (39, 208, 78, 213, 220, 141)
"""Colours of successive forwards, of the 256 of a terminal; neighbours are easy to tell apart."""
RESET = "\x1b[0m"
EXIT_INTERRUPTED = 128 + signal.SIGINT


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
    steps: Iterable[tuple[list[int], int]], decoded: Decoded, counts: list[int], colors: bool
) -> int:
    """Write the text as it comes, tokens of each forward into `counts`; the exit code."""
    code = 0
    try:
        for new, _ in steps:
            counts.append(len(new))
            write_text(decoded.add(new), len(counts), colors)
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    write_text(decoded.end(), len(counts), colors)
    write_text("\n", len(counts), colors=False)
    return code


def report(
    method: str, tokens: int, forwards: int, seconds: float, choices: Sequence[object] = ()
) -> None:
    """The summary; the prompt's forward counts, and its time too. And the steps chosen, if any."""
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
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, moved by calls with the numbers done and of all; silent in a pipe."""
    console = Console(stderr=True)
    with Progress(
        TextColumn(f"{what} {{task.completed:.0f}}/{{task.total:.0f}}"),
        BarColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def reader_may_leave() -> Iterator[None]:
    """A context that ends quietly when the reader of stdout is gone (`| head`)."""
    try:
        yield
    except BrokenPipeError:
        # Python flushes stdout once more on exit; there is nobody left to read it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
