"""One table for terminals, Markdown and HTML, and numbers as all of them show them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from markupsafe import Markup

MISSING = "–"


@dataclass(frozen=True)
class Table:
    """Rows of texts under a head; a short row is filled up with `MISSING`."""

    head: Sequence[str]
    """Names of the columns; none for a table without a head."""
    rows: Sequence[Sequence[str]]
    left: Sequence[int] = (0,)
    """Columns that are aligned to the left; the others, of numbers, to the right."""

    def _lines(self) -> list[list[str]]:
        width = max(map(len, [self.head, *self.rows]), default=0)
        return [[*row, *[MISSING] * (width - len(row))] for row in self.rows]

    def text(self, indent: str = "") -> str:
        """Columns with two spaces between them."""
        lines = [list(self.head), *self._lines()] if self.head else self._lines()
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            indent
            + "  ".join(
                cell.ljust(width) if place in self.left else cell.rjust(width)
                for place, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )

    def markdown(self) -> str:
        """A table of GitHub's Markdown."""
        lines = [list(self.head), ["---"] * len(self.head), *self._lines()]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def html(self) -> "Markup":
        """An escaped <table>; the first cell of a row is its header."""
        from tidar_common.page import render

        return render("table.html", head=self.head, rows=self._lines(), left=self.left)


def fixed(value: float | None, digits: int = 2) -> str:
    """A number with a fixed count of decimals and thousands separators, or a dash."""
    return MISSING if value is None else f"{value:,.{digits}f}"


def percent(share: float | None, digits: int = 0) -> str:
    """A share in [0, 1] as per cent; 100 % is kept for the whole, 0 % for nothing."""
    if share is None:
        return MISSING
    rounded = round(100 * share, digits)
    if (rounded >= 100) != (share >= 1) or (rounded <= 0) != (share <= 0):
        return percent(share, digits + 1) if digits < 4 else f"{100 * share:.4g} %"
    return f"{rounded:.{digits}f} %"


def compact(value: float | None) -> str:
    """A count in three figures: 950, 1.3M, 1.54B."""
    if value is None:
        return MISSING
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        # 999,600 would print as 1,000k
        if abs(value) >= size * (0.9995 if size > 1e3 else 1):
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def significant(value: Any) -> str:
    """A number with four significant digits, whole numbers with separators, None as a dash."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
