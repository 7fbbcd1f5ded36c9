"""Results as plain text: one line for each measure, one column for each thing measured."""

from collections.abc import Mapping, Sequence
from typing import Any


def text_table(columns: Sequence[Mapping[str, Any]]) -> str:
    """Measures that are None in every column are left out; lists stand on one line."""
    every = dict.fromkeys(name for column in columns for name in column)
    names = [name for name in every if any(c.get(name) is not None for c in columns)]
    cells = [[name, *(show(column.get(name)) for column in columns)] for name in names]
    widths = [max(map(len, place)) for place in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        )
        for row in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


def show(value: Any) -> str:
    """A number with four significant digits, whole numbers with separators, None as a dash."""
    if value is None:
        return "-"
    if isinstance(value, list):
        return " ".join(map(show, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
