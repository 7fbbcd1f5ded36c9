"""Charts by matplotlib, as SVG for a page or PNG. matplotlib is imported when something is drawn.

Colours are names of `templates/page.css`, so one drawing serves light and dark, and text takes the
page's font; the same input gives the same bytes.
"""

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from tidar_common.page import render, visible
from tidar_common.tables import Table, compact

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[float, float | None]
_NAMES = ("ar", "diffusion", "greedy", "sampled", "quiet", "ink", "muted", "rule", "surface")
COLORS = {name: f"#7fb3{number:02x}" for number, name in enumerate(_NAMES)}
"""Stand-ins while matplotlib draws; the page has the real ones."""
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tidar",
    "text.parse_math": False,
    "font.size": 12,
    "text.color": COLORS["muted"],
    "axes.labelcolor": COLORS["muted"],
    "xtick.labelcolor": COLORS["muted"],
    "ytick.labelcolor": COLORS["muted"],
    "xtick.color": COLORS["quiet"],
    "axes.edgecolor": COLORS["quiet"],
    "axes.autolimit_mode": "round_numbers",
    "axes.xmargin": 0,
    "axes.ymargin": 0,
    "axes.spines.top": False,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "grid.color": COLORS["rule"],
    "ytick.major.size": 0,
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
}
_MARKERS = {"circle": "o", "ring": "o", "square": "s", "": ""}
BAR_ROW, BAR_LEFT, BAR_RIGHT = 24, 290, 240
LONGEST_LABEL = 44
"""Characters of a bar's label that there is room for."""
TEXT_BAR = 40
"""Characters of the longest bar on a terminal."""


@dataclass(frozen=True)
class Series:
    """One line. `points` are (x, y) in order of x; a y of None is a gap."""

    name: str
    points: Sequence[Point]
    color: str
    """ar, diffusion, greedy, sampled or quiet."""
    dashed: bool = False
    faint: bool = False
    """For raw values behind a smoothed line; left out of the legend."""
    marker: str = ""
    """circle, ring, square or none."""

    @property
    def has_values(self) -> bool:
        return any(y is not None for _, y in self.points)


@dataclass(frozen=True)
class Chart:
    """Lines over steps or positions."""

    title: str
    series: Sequence[Series]
    x_label: str
    y_label: str
    note: str = ""
    reference: tuple[float, str] | None = None
    """A horizontal line to compare with, and what it is."""
    y_range: tuple[float | None, float | None] = (None, None)
    """Values that the y axis shows in any case."""
    x_end: float | None = None
    """Draw x from 0 to here; None takes the data's range."""
    small: bool = False

    @property
    def has_values(self) -> bool:
        return any(series.has_values for series in self.series)

    def svg(self) -> Markup:
        """The drawing alone; title and note are the page's."""
        shown = [series for series in self.series if series.has_values]
        named = [series for series in shown if not series.faint]
        columns = 2 if self.small else 3
        legend = 18 * -(-(len(named) + (self.reference is not None)) // columns)
        width, height = (324, 196 + legend) if self.small else (480, 282 + legend)
        with new_figure(width, height) as figure:
            size = (1 - 60 / width, 1 - (74 + legend) / height)
            axes = figure.add_axes((46 / width, 42 / height, *size))
            for series in shown:
                _draw_series(axes, series)
            self._draw_axes(axes, max(x for series in shown for x, _ in series.points))
            handles, _ = axes.get_legend_handles_labels()
            by_row = [handle for column in range(columns) for handle in handles[column::columns]]
            axes.legend(
                handles=by_row, loc="upper left", bbox_to_anchor=(0, 0, 1, 1), ncols=columns,
                bbox_transform=figure.transFigure, fontsize=12, borderpad=0, borderaxespad=0,
                labelspacing=0.3, columnspacing=1.4, handlelength=1.8, handletextpad=0.5,
            )  # fmt: skip
            return svg(figure, f"{self.title}: {self.y_label} against {self.x_label}")

    def _draw_axes(self, axes: "Axes", last: float) -> None:
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        if self.reference is not None:
            y, label = self.reference
            axes.axhline(y, color=COLORS["ink"], lw=1.2, ls=(0, (2, 3)), alpha=0.7, label=label)
        if self.x_end is not None:
            axes.set_xlim(0, max(self.x_end, last))
        axes.update_datalim([(last, y) for y in self.y_range if y is not None], updatex=False)
        count, steps = ((4, 5) if self.small else (6, 6)), [1, 2, 2.5, 5, 10]
        axes.xaxis.set_major_locator(MaxNLocator(count[0], steps=steps, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(count[1], steps=steps))
        axes.autoscale_view(scalex=self.x_end is None)
        for axis in (axes.xaxis, axes.yaxis):
            ticks = axis.get_majorticklocs()
            step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
            axis.set_major_formatter(FuncFormatter(partial(tick_text, step=step)))
        axes.grid(axis="y", lw=1)
        axes.set_axisbelow(True)
        axes.set_xlabel(self.x_label, labelpad=4)
        axes.tick_params(axis="y", pad=6)
        axes.set_title(self.y_label, loc="left", x=-46 / axes.bbox.width, y=1, fontsize=12, pad=12)


@dataclass(frozen=True)
class Bar:
    label: str
    value: float
    shown: str
    """What stands behind the bar: the value with its unit."""


@dataclass(frozen=True)
class BarChart:
    """Rows of bars from a common zero."""

    title: str
    bars: Sequence[Bar]
    note: str = ""
    mark: float | None = None
    """A value to compare with, as a dashed line; the note says what it is."""

    @property
    def has_values(self) -> bool:
        return bool(self.bars)

    def svg(self) -> Markup:
        width, height = 860, 12 + BAR_ROW * len(self.bars)
        labels = [visible(bar.label) for bar in self.bars]
        with new_figure(width, height) as figure:
            axes = figure.add_axes((BAR_LEFT / width, 0, 1 - (BAR_LEFT + BAR_RIGHT) / width, 1))
            drawn = axes.barh(range(len(labels)), [bar.value for bar in self.bars], 0.66,
                              color=COLORS["ar"])  # fmt: skip
            axes.bar_label(drawn, [visible(bar.shown) for bar in self.bars], padding=6)
            axes.set_yticks(range(len(labels)), [
                label if len(label) <= LONGEST_LABEL else f"{label[: LONGEST_LABEL - 1]}…"
                for label in labels
            ])  # fmt: skip
            if self.mark is not None:
                axes.axvline(self.mark, color=COLORS["diffusion"], lw=1, ls=(0, (4, 3)))
            axes.set_xlim(0, max([bar.value for bar in self.bars] + [self.mark or 0.0]) or 1.0)
            axes.set_ylim(len(labels) - 0.25, -0.75)
            axes.spines[["left", "bottom"]].set_visible(False)
            axes.axvline(0, color=COLORS["rule"], lw=1)
            axes.tick_params(axis="y", labelcolor=COLORS["ink"], pad=8)
            axes.xaxis.set_visible(False)
            return svg(figure, self.title)

    def text(self) -> str:
        """The chart for a terminal, its title first."""
        most = max((bar.value for bar in self.bars), default=0.0) or 1.0
        rows = [(b.label, b.shown, "#" * round(TEXT_BAR * b.value / most)) for b in self.bars]
        body = Table((), rows, left=(0, 2)).text("  ") if rows else "  none"
        note = f": {self.note}" if self.note else ""
        return f"{self.title}{note}\n{body}"


def chart_grid(charts: Sequence[Chart | BarChart], columns: int = 1) -> Markup:
    """Charts beside each other, each with its title and note."""
    return render("charts.html", charts=charts, columns=columns)


def png(pixels: NDArray[np.uint8]) -> bytes:
    """An RGB picture [height, width, 3] as a PNG file."""
    from matplotlib.image import imsave

    file = io.BytesIO()
    imsave(file, pixels, format="png")
    return file.getvalue()


def svg(figure: "Figure", label: str, natural: bool = False) -> Markup:
    """A figure as an <svg> element of a page, in the page's font and colours, or as a file of its
    own; `natural` keeps its own size instead of the width that there is."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = text[text.index(">", text.index("<svg")) + 1 :]
    for pattern, replacement in (
        (r"<defs>\s*<style.*?</style>\s*</defs>", ""),  # would hold for the whole page
        (r' clip-path="[^"]*"', ""),  # nothing is drawn outside of the axes
        (r"<defs>\s*<clipPath.*?</defs>", ""),
        (r' transform="rotate\(-?0 [^"]*"', ""),
        (r"font-family: [^;\"]*(; )?", ""),
        (r'<g id="[^"]*"/>', ""),
        (r'<g id="[^"]*">', "<g>"),
        (r"<g>\s*(<(?:use|path)[^>]*/>|<text[^>]*>[^<]*</text>)\s*</g>", r"\1"),
        (r"\n\s*", "\n"),
    ):
        text = re.sub(pattern, replacement, text, flags=re.DOTALL)
    text = re.sub("<[^>]*>", lambda tag: _shorter(tag[0]), text)
    for name, color in COLORS.items():
        text = text.replace(color, f"var(--{name})")
    width, height = (round(72 * side) for side in figure.get_size_inches())
    size = Markup('width="{}" height="{}" ').format(width, height) if natural else ""
    head = Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        '{}viewBox="0 0 {} {}" role="img" aria-label="{}" '
        'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">'
    )
    return head.format(size, width, height, visible(label)) + Markup(text)


def _shorter(tag: str) -> str:
    """A tag on one line, its numbers with two decimals: hundredths of a pixel."""
    return re.sub(r"(\d\.\d\d)\d+", r"\1", tag.replace("\n", " "))


def tick_text(value: float, place: int | None = None, *, step: float) -> str:
    """A tick's label with as many decimals as the distance between ticks needs; `place`, its number
    on the axis, is matplotlib's and changes nothing."""
    if abs(value) < step / 1e6:
        return "0"
    if abs(value) >= 10_000:
        return compact(value)
    if step < 0.001:
        digits, exponent = f"{value:.1e}".split("e")
        return f"{float(digits):g}e{int(exponent)}"
    decimals = 0
    while abs(round(step, decimals) - step) > step * 1e-6:
        decimals += 1
    return f"{value:,.{decimals}f}"


@contextmanager
def new_figure(width: float, height: float) -> Iterator["Figure"]:
    """A figure of so many CSS pixels, in the style of the pages; nothing global stays changed."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # The page's font may have a letter that matplotlib's lacks; it only measures with its own.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        yield Figure(figsize=(width / 72, height / 72), dpi=72)


def _draw_series(axes: "Axes", series: Series) -> None:
    color = COLORS[series.color]
    marks: dict[str, Any] = {"marker": _MARKERS[series.marker], "ms": 7, "mew": 1.6}
    if series.marker == "ring":
        marks["mfc"] = COLORS["surface"]
    axes.plot(
        [x for x, _ in series.points],
        [np.nan if y is None else y for _, y in series.points],
        color=color, ls=(0, (3, 3)) if series.dashed else "-", clip_on=False,
        lw=1 if series.faint else 1.6 if series.dashed else 2, alpha=0.32 if series.faint else None,
        label="_" if series.faint else visible(series.name), **marks,
    )  # fmt: skip
