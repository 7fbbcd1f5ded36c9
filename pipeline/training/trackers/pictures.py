"""Small pages for trackers that show HTML: a coloured generation, and acceptance over training."""

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from pipeline.report.generation import generation_section
from pipeline.report.wording import escape

CELL = 22
MARGIN = 64
MOST_ROWS = 40
"""Evals that a heat map shows; of more, as many as fit are picked evenly, the last included."""


def generation_page(example: dict[str, Any]) -> str:
    """`evals/example.json` as a page of its own, coloured as in report.html."""
    style = resources.files("pipeline.report").joinpath("style.css").read_text(encoding="utf-8")
    return page(f"<style>{style}</style>", generation_section(example))


def acceptance_page(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """A heat map of the rows' `acceptance_by_position`, one line an eval, None without any.

    Args:
        rows: of one method and temperature, in order of step.
    """
    rows = [row for row in rows if row.get("acceptance_by_position")]
    if not rows:
        return None
    if len(rows) > MOST_ROWS:
        last = len(rows) - 1
        rows = [rows[round(i * last / (MOST_ROWS - 1))] for i in range(MOST_ROWS)]
    width = max(len(row["acceptance_by_position"]) for row in rows)
    cells = "".join(line(number, row) for number, row in enumerate(rows))
    top = "".join(
        f'<text x="{MARGIN + CELL * i + CELL / 2}" y="14" text-anchor="middle">{i + 1}</text>'
        for i in range(width)
    )
    svg = (
        f'<svg width="{MARGIN + CELL * width + 4}" height="{CELL * (len(rows) + 1)}" role="img" '
        f'aria-label="acceptance by position over training" font-family="sans-serif" '
        f'font-size="11">{top}{cells}</svg>'
    )
    text = "Share of drafts accepted, by position in the block (across) and step (down)."
    return page("", f"<p>{text}</p>{svg}")


def line(number: int, row: Mapping[str, Any]) -> str:
    """One eval: its step, and a square for each position; an unreached position has none."""
    y = CELL * (number + 1)
    squares = "".join(
        f'<rect x="{MARGIN + CELL * i}" y="{y}" width="{CELL - 1}" height="{CELL - 1}" '
        f'fill="{shade(rate)}"><title>step {row["step"]}, position {i + 1}: {rate:.1%}</title>'
        "</rect>"
        for i, rate in enumerate(row["acceptance_by_position"])
        if rate is not None
    )
    step = f'<text x="{MARGIN - 6}" y="{y + 15}" text-anchor="end">{row["step"]}</text>'
    return step + squares


def shade(rate: float) -> str:
    """White for 0, dark blue for 1."""
    low, high = (247, 251, 255), (8, 48, 107)
    return "#" + "".join(f"{round(a + (b - a) * rate):02x}" for a, b in zip(low, high, strict=True))


def page(head: str, body: str) -> str:
    title = escape("TiDAR")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"{head}</head><body>{body}</body></html>"
    )
