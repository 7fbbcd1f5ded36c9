"""Results as plain text: one line for each measure, one column for each thing measured."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def text_table(columns: Sequence[Mapping[str, Any]]) -> str:
    """Measures that are None in every column are left out; a list takes several lines."""
    spread = [dict(_spread(column)) for column in columns]
    every = dict.fromkeys(name for column in spread for name in column)
    names = [name for name in every if any(c.get(name) is not None for c in spread)]
    cells = [[name, *(show(column.get(name)) for column in spread)] for name in names]
    widths = [max(map(len, place)) for place in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        )
        for row in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


def _spread(column: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Draft positions of a block count from 1 (0 is the verifier's), its places from 0."""
    for name, value in column.items():
        if isinstance(value, list):
            first = 0 if name.endswith("_by_place") else 1
            yield from ((f"{name} {number}", entry) for number, entry in enumerate(value, first))
        elif isinstance(value, dict):
            yield from ((f"{name} {key}", entry) for key, entry in _spread(value))
        else:
            yield name, value


def show(value: Any) -> str:
    """A number with four significant digits, whole numbers with separators, None as a dash."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
