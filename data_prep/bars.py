"""Bar charts as inline SVG, and a page of them that needs no other file.

Colours and fonts come from the page's style sheet, for light and dark; the same input always gives
the same bytes.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, ROW, LEFT, RIGHT, TOP = 860, 24, 290, 240, 6
LONGEST_LABEL = 44
"""Characters of a label that there is room for; the whole of a longer one shows under the mouse."""
_CONTROL = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"} | {127: "␡"}
_STYLE = """
:root { --page: #f6f7f8; --surface: #fff; --ink: #1a2027; --muted: #58636f; --rule: #dfe3e7;
  --bar: #0072b2; --care: #c8500a }
@media (prefers-color-scheme: dark) { :root { --page: #101316; --surface: #181c21; --ink: #e4e8ec;
  --muted: #9aa5b1; --rule: #2c333a; --bar: #56b4e9; --care: #ff9a57 } }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
main { max-width: 940px; margin: 0 auto; padding: 32px 24px }
h1 { font-size: 1.6rem; margin: 0 0 8px; overflow-wrap: anywhere }
h2 { font-size: 1rem; margin: 0 }
p { color: var(--muted); margin: 4px 0; max-width: 80ch }
figure { margin: 20px 0; padding: 14px 18px; background: var(--surface);
  border: 1px solid var(--rule); border-radius: 8px }
svg { display: block; width: 100%; height: auto; margin-top: 8px }
svg text { font-size: 13px; fill: var(--ink); font-variant-numeric: tabular-nums }
svg .quiet { fill: var(--muted) }
.bar { fill: var(--bar) }
.axis { stroke: var(--rule) }
.mark { stroke: var(--care); stroke-dasharray: 4 3 }
"""


@dataclass(frozen=True)
class Bar:
    """One row of a chart."""

    label: str
    value: float
    shown: str
    """What stands behind the bar: the value with its unit."""


@dataclass(frozen=True)
class BarChart:
    """Rows of bars from a common zero; `draw` makes the figure."""

    title: str
    bars: Sequence[Bar]
    note: str = ""
    mark: float | None = None
    """A value to compare with, as a dashed line; the note says what it is."""
    empty: str = "None."
    """What stands there without bars."""

    def draw(self) -> str:
        """The chart as an HTML <figure>."""
        note = f"<p>{escape(self.note)}</p>" if self.note else ""
        body = self._svg() if self.bars else f"<p>{escape(self.empty)}</p>"
        return f"<figure><h2>{escape(self.title)}</h2>{note}{body}</figure>"

    def _svg(self) -> str:
        most = max([bar.value for bar in self.bars] + [self.mark or 0.0]) or 1.0
        scale = (WIDTH - LEFT - RIGHT) / most
        height = 2 * TOP + ROW * len(self.bars)
        marks = [f'<path class="axis" d="M{LEFT} 0V{height}"/>']
        for number, bar in enumerate(self.bars):
            top, middle = TOP + ROW * number, TOP + ROW * number + 17
            length = bar.value * scale
            label = bar.label
            if len(label) > LONGEST_LABEL:
                label = label[: LONGEST_LABEL - 1] + "…"
            tip = f"<title>{escape(bar.label)}: {escape(bar.shown)}</title>"
            marks += [
                f'<text x="{LEFT - 8}" y="{middle}" text-anchor="end">{tip}{escape(label)}</text>',
                f'<rect class="bar" x="{LEFT}" y="{top + 4}" width="{length:.1f}" '
                f'height="{ROW - 8}">{tip}</rect>',
                f'<text class="quiet" x="{LEFT + length + 6:.1f}" y="{middle}">'
                f"{escape(bar.shown)}</text>",
            ]
        if self.mark is not None:
            marks.append(f'<path class="mark" d="M{LEFT + self.mark * scale:.1f} 0V{height}"/>')
        return (
            f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(self.title)}">'
            + "\n".join(marks)
            + "</svg>"
        )


def page(title: str, paragraphs: Sequence[str], charts: Sequence[BarChart]) -> str:
    """A whole HTML page with nothing to load: title, text, charts."""
    text = "\n".join(f"<p>{escape(paragraph)}</p>" for paragraph in paragraphs)
    figures = "\n".join(chart.draw() for chart in charts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><main><h1>{escape(title)}</h1>\n{text}\n{figures}\n</main></body></html>\n"
    )


def escape(text: str) -> str:
    """HTML-escaped text that UTF-8 can store; control characters become visible pictures."""
    stored = text.encode(errors="backslashreplace").decode()
    return html.escape(stored.translate(_CONTROL), quote=True)
