"""Leaving an eval before its end, on all ranks at the same place."""

from collections.abc import Callable

Check = Callable[[], None]
"""Called by all ranks together, equally often; raises on all of them alike, or on none."""


class EvalInterruptedError(RuntimeError):
    """The eval was left before its end; it has no result and has to be repeated."""


def never() -> None:
    """The check of an eval that runs to its end."""
