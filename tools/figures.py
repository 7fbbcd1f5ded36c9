"""Draw the pictures of docs/method.md: `python -m tools.figures` rewrites them.

The mask pictures state the attention rules once more, in their own words, and refuse to draw
anything that `dense_mask` and `step_mask`, which training and decoding use, do not say too.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from data_prep.layout import Layout, build_layout
from pipeline.decoding.step import StepShape, step_mask
from pipeline.model.mask import dense_mask
from tidar_common.figures import new_figure, svg

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "figures"
INK, MUTED, FAINT, PAPER = "#1a2027", "#5b6671", "#e9ecef", "#ffffff"
BLUE, GREEN, ORANGE, PURPLE, GREY = "#4a9fd8", "#2fae86", "#f0a830", "#c777ab", "#aab3bb"
DOCUMENT_LENGTHS, BLOCK_SIZE = (7, 5), 4
STEP_BLOCK_SIZE, STEP_PREFIX, STEP_ACCEPTED = 3, 4, 2

CAUSAL, PREFIX, BLOCK = "clean to clean", "slot to its prefix", "slot to its own block"
COLORS = {CAUSAL: BLUE, PREFIX: GREEN, BLOCK: ORANGE}
Span = tuple[int, int, str]
"""First cell, end and name."""


@dataclass(frozen=True)
class Canvas:
    """Shapes at pixels from the top left, on an opaque sheet that reads on light and dark pages."""

    figure: Figure
    axes: Axes

    def box(
        self,
        x: float,
        y: float,
        size: tuple[float, float],
        fill: str,
        radius: int = 2,
        **style: Any,
    ) -> None:
        shape = f"round,pad=0,rounding_size={radius}"
        self.axes.add_patch(FancyBboxPatch((x, y), *size, boxstyle=shape,
                                           **{"fc": fill, "lw": 0, **style}))  # fmt: skip

    def text(self, x: float, y: float, words: str, anchor: str = "center", **style: Any) -> None:
        self.axes.text(x, y, words, ha=anchor, **{"fontsize": 13, "color": INK, **style})

    def line(
        self, xs: Sequence[float], ys: Sequence[float], color: str = MUTED, **style: Any
    ) -> None:
        self.axes.plot(xs, ys, color=color, **{"lw": 1.4, **style})

    def cells(self, place: "Grid", colors: Mapping[tuple[int, int], str]) -> None:
        """Squares by (row, column)."""
        xs = [place.x(column + 0.5) for _, column in colors]
        ys = [place.y(row + 0.5) for row, _ in colors]
        size = (place.cell - 2) ** 2
        self.axes.scatter(xs, ys, size, list(colors.values()), marker="s", linewidths=0)

    def legend(self, x: float, y: float, colors: Mapping[str, str]) -> None:
        for name, color in colors.items():
            self.box(x, y, (13, 13), color)
            self.text(x + 19, y + 11, name, "left", fontsize=12.5)
            x += 46 + 6.5 * len(name)


@dataclass(frozen=True)
class Grid:
    """Where the cells of a mask stand."""

    left: int
    top: int
    cell: int

    def x(self, column: float) -> float:
        return self.left + column * self.cell

    def y(self, row: float) -> float:
        return self.top + row * self.cell


@contextmanager
def sheet(width: int, height: int) -> Iterator[Canvas]:
    with new_figure(width, height) as figure:
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
        axes.axis("off")
        canvas = Canvas(figure, axes)
        canvas.box(0, 0, (width, height), PAPER, radius=8)
        yield canvas


def rule(lengths: tuple[int, ...], layout: Layout, query: int, key: int) -> str | None:
    """The rule by which `query` may attend to `key`, or None; both count S clean, then M slots."""
    total = sum(lengths)
    document = [number for number, length in enumerate(lengths) for _ in range(length)]
    slot_block = [int(block) for block in layout.slot_block]
    if query < total:
        allowed = key < total and key <= query and document[key] == document[query]
        return CAUSAL if allowed else None
    block = slot_block[query - total]
    if key >= total:
        return BLOCK if slot_block[key - total] == block else None
    start = int(layout.prefix_end[block])
    return PREFIX if key < start and document[key] == document[start] else None


def training_mask(lengths: tuple[int, ...], block_size: int) -> str:
    """The attention mask of one packed sequence, coloured by rule."""
    layout = build_layout(lengths, block_size)
    total = sum(lengths)
    side = total + layout.num_slots
    allowed = dense_mask(lengths, layout)
    grid, colors = Grid(164, 104, 24), {}
    for row in range(side):
        for column in range(side):
            why = rule(lengths, layout, row, column)
            if (why is not None) != bool(allowed[row, column]):
                raise ValueError(f"the rule here and dense_mask differ at {row}, {column}")
            colors[row, column] = COLORS[why] if why else FAINT
    with sheet(grid.left + side * grid.cell + 24, grid.top + side * grid.cell + 66) as canvas:
        canvas.cells(grid, colors)
        positions = [*range(total), *(int(position) for position in layout.slot_position)]
        for index, position in enumerate(positions):
            name = f"x{position}" if index < total else f"m{position}"
            style: dict[str, Any] = {"fontsize": 10.5, "color": MUTED}
            canvas.text(grid.x(index + 0.5), grid.top - 7, name, **style)
            canvas.text(grid.left - 6, grid.y(index + 0.5) + 4, name, "right", **style)
        _mask_frame(canvas, lengths, layout, grid)
        canvas.legend(grid.left - 40, grid.y(side) + 29, {**COLORS, "never": FAINT})
        return svg(canvas.figure, "TiDAR training mask", natural=True)


def _mask_frame(canvas: Canvas, lengths: tuple[int, ...], layout: Layout, grid: Grid) -> None:
    """Section and document borders and their names."""
    total, side = sum(lengths), sum(lengths) + layout.num_slots
    spans: list[Span] = []
    start = 0
    for number, length in enumerate(lengths):
        spans.append((start, start + length, f"document {number}"))
        start += length
    for block in range(layout.num_blocks):
        low = total + int(layout.slot_start[block])
        spans.append((low, low + int(layout.draft_lengths[block]), f"block {block}"))
    for low, high, name in spans:
        short = name if high - low > 2 else name.replace("block ", "b")
        _bracket_columns(canvas, grid, (low, high, short), 22)
        _bracket_rows(canvas, grid, (low, high, name), 34)
    for low, high, name in ((0, total, "clean section"), (total, side, "mask section")):
        middle = (low + high) / 2
        style: dict[str, Any] = {"weight": "bold", "fontsize": 14}
        canvas.text(grid.x(middle), grid.top - 60, f"keys: {name}", **style)
        canvas.text(24, grid.y(middle), f"queries: {name}", rotation=90, va="center", **style)
    split, end = grid.x(total), grid.x(side)
    canvas.line((split, split), (grid.top - 50, grid.y(side)), INK, lw=1.6)
    canvas.line((grid.left - 110, end), (grid.y(total), grid.y(total)), INK, lw=1.6)


def _bracket_columns(canvas: Canvas, grid: Grid, span: Span, above: int) -> None:
    low, high, name = span
    canvas.line((grid.x(low) + 2, grid.x(high) - 2), [grid.top - above] * 2)
    canvas.text(grid.x((low + high) / 2), grid.top - above - 7, name, fontsize=12)


def _bracket_rows(canvas: Canvas, grid: Grid, span: Span, beside: int) -> None:
    low, high, name = span
    canvas.line([grid.left - beside] * 2, (grid.y(low) + 2, grid.y(high) - 2))
    canvas.text(grid.left - beside - 6, grid.y((low + high) / 2) + 4, name, "right", fontsize=12)


STEP_CELL, STEP_ROW, STEP_LEFT, STEP_TOP, STEP_CACHED = 66, 50, 236, 92, 3
"""Pixels of a position, of a row, and where both begin; cached tokens that are drawn."""


def decoding_step(block_size: int, accepted: int) -> str:
    """Drafts, the blocks for every acceptance count, and what one outcome leaves."""
    width = STEP_LEFT + (STEP_CACHED + 2 * block_size) * STEP_CELL + 24
    with sheet(width, STEP_TOP + (block_size + 3) * STEP_ROW + 48) as canvas:
        quiet: dict[str, Any] = {"fontsize": 12, "color": MUTED}
        for column in range(-STEP_CACHED, 2 * block_size):
            name = "P" if column == 0 else f"P{column:+d}".replace("-", "−")
            x = STEP_LEFT + (STEP_CACHED + column + 0.5) * STEP_CELL
            canvas.text(x, STEP_TOP - 16, name, **quiet)
        canvas.text(STEP_LEFT - 14, STEP_TOP - 16, "position", "right", **quiet)
        _headline(canvas, 34, "One forward pass")
        words = f"K = {block_size}: {block_size} drafts and {block_size} blocks of {block_size} "
        canvas.text(24, 54, words + "mask tokens, all at once", "left", color=MUTED)
        _label(canvas, STEP_TOP, "cache and drafts", "verified by the AR logits")
        for column in range(-STEP_CACHED, 0):
            _token(canvas, column, STEP_TOP, "cached", GREY)
        for index in range(block_size):
            _token(canvas, index, STEP_TOP, f"d{index}", PURPLE if index == 0 else BLUE)
        for block in range(1, block_size + 1):
            y = STEP_TOP + block * STEP_ROW
            seen = "d0" if block == 1 else f"d0 … d{block - 1}"
            _label(canvas, y, f"block {block}", f"if {block} accepted; sees {seen}")
            style: dict[str, Any] = {"ec": INK, "lw": 2} if block == accepted else {"alpha": 0.45}
            for slot in range(block_size):
                _token(canvas, block + slot, y, "mask", ORANGE, **style)
        _outcome(canvas, block_size, accepted, STEP_TOP + (block_size + 1) * STEP_ROW)
        return svg(canvas.figure, "One step", natural=True)


def _headline(canvas: Canvas, y: float, words: str) -> None:
    canvas.text(24, y, words, "left", fontsize=16, weight="bold")


def _label(canvas: Canvas, y: float, words: str, below: str) -> None:
    canvas.text(STEP_LEFT - 14, y + 14, words, "right", weight="bold")
    canvas.text(STEP_LEFT - 14, y + 30, below, "right", fontsize=12, color=MUTED)


def _token(canvas: Canvas, column: int, y: float, words: str, color: str, **style: Any) -> None:
    """At `column` positions from the first draft."""
    x = STEP_LEFT + (STEP_CACHED + column) * STEP_CELL
    canvas.box(x + 2, y, (STEP_CELL - 4, 34), color, radius=5, **style)
    canvas.text(x + STEP_CELL / 2, y + 22, words, fontsize=14)


def _outcome(canvas: Canvas, block_size: int, accepted: int, y: float) -> None:
    """The state after a step in which `accepted` drafts, d_0 among them, were kept."""
    end = STEP_LEFT + (STEP_CACHED + 2 * block_size) * STEP_CELL
    canvas.line((24, end), (y + 4, y + 4), GREY, lw=1, ls=(0, (4, 4)))
    kept = ", ".join(f"d{index}" for index in range(accepted))
    words = f"If {kept} are accepted and d{accepted} is rejected: the next step starts from"
    _headline(canvas, y + 32, words)
    _label(canvas, y + 52, "next cache and drafts", f"from block {accepted}")
    entries = [("cached", GREY)] * STEP_CACHED + [(f"d{index}", GREY) for index in range(accepted)]
    entries += [("new d0", PURPLE)] + [(f"new d{index}", ORANGE) for index in range(1, block_size)]
    for column, (name, color) in enumerate(entries, -STEP_CACHED):
        _token(canvas, column, y + 52, name, color)
    canvas.legend(24, y + 113, {
        "kept in the cache": GREY, "final: set by the verifier": PURPLE, "draft to verify": BLUE,
        "mask tokens, and drafts read from them": ORANGE,
    })  # fmt: skip


def decoding_mask(block_size: int, prefix: int) -> str:
    """Which query of a decoding step sees which key."""
    rows = block_size + block_size**2
    allowed = step_mask(StepShape.full(block_size), prefix, torch.device("cpu"))
    owners = [0] * block_size + [b for b in range(1, block_size + 1) for _ in range(block_size)]
    names = [f"d{i}" for i in range(block_size)] + ["M"] * block_size**2
    grid, colors = Grid(126, 96, 26), {}
    for query in range(rows):
        for key in range(-prefix, rows):
            color = _step_color(owners, block_size, query, key)
            if (color != FAINT) != bool(allowed[query, prefix + key]):
                raise ValueError(f"the rule here and step_mask differ at {query}, {key}")
            colors[query, prefix + key] = color
    blocks = [
        (b * block_size, (b + 1) * block_size, f"block {b}") for b in range(1, block_size + 1)
    ]
    height = grid.top + rows * grid.cell + 62
    with sheet(grid.left + (prefix + rows) * grid.cell + 24, height) as canvas:
        canvas.cells(grid, colors)
        for index, name in enumerate(names):
            canvas.text(grid.left - 8, grid.y(index + 0.65), name, "right", fontsize=11)
            canvas.text(grid.x(prefix + index + 0.5), grid.top - 7, name, fontsize=11, color=MUTED)
        _bracket_columns(canvas, grid, (0, prefix, "cache"), 24)
        for low, high, name in [(0, block_size, "drafts"), *blocks]:
            _bracket_columns(canvas, grid, (prefix + low, prefix + high, name), 24)
            _bracket_rows(canvas, grid, (low, high, name), 30)
        canvas.text(grid.left, 28, "keys", "left", weight="bold", fontsize=14)
        canvas.text(grid.left - 37, grid.top - 7, "queries", "right", weight="bold", fontsize=14)
        canvas.legend(24, grid.y(rows) + 27, {
            "cache": GREY, "drafts up to itself; in block j, d0 … d(j−1)": BLUE,
            "own block": ORANGE,
        })  # fmt: skip
        return svg(canvas.figure, "Decoding mask", natural=True)


def _step_color(owners: list[int], block_size: int, query: int, key: int) -> str:
    if key < 0:
        return GREY
    block = owners[query]
    if key < block_size:
        seen = key <= query if block == 0 else key < block
        return BLUE if seen else FAINT
    return ORANGE if block and owners[key] == block else FAINT


def figures() -> dict[str, str]:
    """File name and SVG text of every picture."""
    return {
        "training_mask.svg": training_mask(DOCUMENT_LENGTHS, BLOCK_SIZE),
        "decoding_step.svg": decoding_step(STEP_BLOCK_SIZE, STEP_ACCEPTED),
        "decoding_mask.svg": decoding_mask(STEP_BLOCK_SIZE, STEP_PREFIX),
    }


if __name__ == "__main__":
    for file_name, text in figures().items():
        (FOLDER / file_name).write_text(text, encoding="utf-8")
        print(FOLDER / file_name)
