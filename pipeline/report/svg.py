"""Line charts as hand-written inline SVG.

Colours and fonts come from the page's style sheet, so one drawing serves light and dark; the same
input always gives the same bytes.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.report.wording import escape, tick_text

Point = tuple[float, float | None]
WIDTH, HEIGHT = 480, 290
SMALL_WIDTH, SMALL_HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 30, 42


@dataclass(frozen=True)
class Series:
    """One line. `points` are (x, y) in order of x; a y of None is a gap."""

    name: str
    points: Sequence[Point]
    color: str
    """A colour of the style sheet: ar, diffusion, greedy, sampled or quiet."""
    dashed: bool = False
    faint: bool = False
    """For raw values behind a smoothed line; left out of the legend."""
    marker: str = ""
    """circle, ring, square or none."""

    @property
    def has_values(self) -> bool:
        return any(y is not None for _, y in self.points)


@dataclass(frozen=True)
class Reference:
    """A labelled horizontal line."""

    y: float
    label: str


@dataclass(frozen=True)
class Chart:
    """What a chart shows; `draw` makes the figure."""

    title: str
    series: Sequence[Series]
    x_label: str
    y_label: str
    note: str = ""
    references: Sequence[Reference] = ()
    y_range: tuple[float | None, float | None] = (None, None)
    """Fixed ends of the y axis; None takes the data's."""
    x_end: float | None = None
    """Draw x from 0 to here; None takes the data's range."""
    small: bool = False

    def draw(self) -> str:
        """The chart as an HTML <figure>."""
        shown = [series for series in self.series if series.has_values]
        size = (SMALL_WIDTH, SMALL_HEIGHT) if self.small else (WIDTH, HEIGHT)
        body = _Axes(self, shown, size).draw() if shown else '<p class="empty">No values yet.</p>'
        note = f'<p class="note">{self.note}</p>' if self.note else ""
        return (
            f'<figure class="chart{" small" if self.small else ""}">'
            f"<figcaption><h3>{escape(self.title)}</h3>{_legend(shown)}</figcaption>"
            f"{body}{note}</figure>\n"
        )


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers that cover [low, high]; the first <= low, the last >= high."""
    span = high - low or abs(high) or 1.0
    raw = span / max(1, count)
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, max(last, first + 1) + 1)]


class _Axes:
    """The scales of one chart, and the marks drawn on them."""

    def __init__(self, chart: Chart, shown: Sequence[Series], size: tuple[int, int]) -> None:
        self.chart, self.shown = chart, shown
        self.width, self.height = size
        xs = [x for series in shown for x, _ in series.points]
        ys = [y for series in shown for _, y in series.points if y is not None]
        ys += [reference.y for reference in chart.references]
        ys += [end for end in chart.y_range if end is not None]
        self.y_ticks = nice_ticks(min(ys), max(ys), 4 if chart.small else 5)
        self.y_low, self.y_high = self.y_ticks[0], self.y_ticks[-1]
        self.x_low, self.x_high = min(xs), max(xs)
        if chart.x_end is not None:
            self.x_low, self.x_high = 0.0, max(chart.x_end, self.x_high)
        if self.x_low == self.x_high:
            self.x_low, self.x_high = self.x_low - 1, self.x_high + 1
        ticks = nice_ticks(self.x_low, self.x_high, 4 if chart.small else 6)
        # Steps and draft positions are whole numbers.
        self.x_ticks = [
            tick for tick in ticks if self.x_low <= tick <= self.x_high and tick == round(tick)
        ]

    def x(self, value: float) -> float:
        share = (value - self.x_low) / (self.x_high - self.x_low)
        return LEFT + share * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return self.height - BOTTOM - share * (self.height - TOP - BOTTOM)

    def draw(self) -> str:
        label = escape(f"{self.chart.title}: {self.chart.y_label} against {self.chart.x_label}")
        marks = [
            *self._grid(),
            *(line for series in self.shown for line in self._line(series)),
            *(mark for reference in self.chart.references for mark in self._reference(reference)),
        ]
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{label}">\n'
            + "\n".join(marks)
            + "\n</svg>"
        )

    def _grid(self) -> Iterable[str]:
        right, bottom = self.width - RIGHT, self.height - BOTTOM
        y_step = self.y_ticks[1] - self.y_ticks[0]
        for tick in self.y_ticks:
            y = self.y(tick)
            kind = "axis" if tick == self.y_low else "rule"
            yield f'<path class="{kind}" d="M{LEFT} {y:.1f}H{right}"/>'
            text = tick_text(tick, y_step)
            yield _text("tick", LEFT - 7, y + 4, "end", text)
        x_step = self.x_ticks[1] - self.x_ticks[0] if len(self.x_ticks) > 1 else 1.0
        for tick in self.x_ticks:
            x = self.x(tick)
            text = tick_text(tick, x_step)
            yield f'<path class="axis" d="M{x:.1f} {bottom}v4"/>'
            yield _text("tick", x, bottom + 18, "middle", text)
        yield _text("label", (LEFT + right) / 2, self.height - 6, "middle", self.chart.x_label)
        yield _text("label", 0, 12, "start", self.chart.y_label)

    def _line(self, series: Series) -> Iterable[str]:
        kinds = ["line", series.color]
        kinds += [name for name in ("dashed", "faint") if getattr(series, name)]
        path = self._path(series.points)
        if path:
            yield f'<path class="{" ".join(kinds)}" d="{path}"/>'
        if not series.marker:
            return
        for x, y in series.points:
            if y is not None:
                tip = f"{series.name}, {self.chart.x_label} {x:g}: {y:.4g}"
                yield _marker(series, self.x(x), self.y(y), tip)

    def _path(self, points: Sequence[Point]) -> str:
        commands, pen_down = [], False
        for x, y in points:
            if y is None:
                pen_down = False
                continue
            commands.append(f"{'L' if pen_down else 'M'}{self.x(x):.1f} {self.y(y):.1f}")
            pen_down = True
        return "".join(commands)

    def _reference(self, reference: Reference) -> Iterable[str]:
        y, right = self.y(reference.y), self.width - RIGHT
        yield f'<path class="reference" d="M{LEFT} {y:.1f}H{right}"/>'
        places = [
            (x, baseline, anchor)
            for x, anchor in ((right - 2, "end"), (LEFT + 4, "start"))
            for baseline in (y - 5, y + 14)
            if baseline - 10 > TOP and baseline + 3 < self.height - BOTTOM
        ]
        width = 6.2 * len(reference.label)
        x, baseline, anchor = max(places, key=lambda place: self._free(place, width))
        yield _text("reference-label", x, baseline, anchor, reference.label)

    def _free(self, place: tuple[float, float, str], width: float) -> float:
        """Height between a label at (x, baseline, anchor) and the nearest line, at most 30."""
        x, baseline, anchor = place
        low = x - width if anchor == "end" else x
        middle, nearest = baseline - 4, 30.0
        for series in self.shown:
            known = [(self.x(a), self.y(b)) for a, b in series.points if b is not None]
            for (x0, y0), (x1, y1) in zip(known, known[1:] or known, strict=False):
                steps = max(1, int((x1 - x0) / 8))
                for step in range(steps + 1):
                    share = step / steps
                    if low - 6 <= x0 + share * (x1 - x0) <= low + width + 6:
                        nearest = min(nearest, abs(y0 + share * (y1 - y0) - middle))
        return nearest


def _text(kind: str, x: float, y: float, anchor: str, text: str) -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _marker(series: Series, x: float, y: float, tip: str) -> str:
    kinds = f"marker {series.color}" + (" ring" if series.marker == "ring" else "")
    title = f"<title>{escape(tip)}</title>"
    if series.marker == "square":
        shape = f'<rect class="{kinds}" x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7">'
        return f"{shape}{title}</rect>"
    return f'<circle class="{kinds}" cx="{x:.1f}" cy="{y:.1f}" r="3.8">{title}</circle>'


def _legend(shown: Sequence[Series]) -> str:
    entries = []
    for series in shown:
        if series.faint:
            continue
        kinds = f"line {series.color}" + (" dashed" if series.dashed else "")
        sample = f'<path class="{kinds}" d="M0 6H24"/>'
        if series.marker:
            sample += _marker(series, 12, 6, series.name)
        entries.append(
            f'<li><svg class="sample" viewBox="0 0 24 12" aria-hidden="true">{sample}</svg>'
            f"{escape(series.name)}</li>"
        )
    return f'<ul class="legend">{"".join(entries)}</ul>' if entries else ""
