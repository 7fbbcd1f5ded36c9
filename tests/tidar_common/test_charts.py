"""Charts as SVG: ticks, gaps, legends and names that no font and no XML likes."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from tidar_common.figures import Chart, Series, tick_text


def texts(svg: str) -> list[str]:
    root = ElementTree.fromstring(svg)
    return [str(node.text) for node in root.iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize(("low", "high"), [(0, 1), (3.71, 8.2), (1, 300), (-2, 2), (5, 5), (0, 0)])
def test_ticks_cover_the_range(low: float, high: float, small: bool) -> None:
    chart = Chart("t", [Series("s", [(1, low), (3, high)], "ar")], "x", "nats", small=small)
    shown = texts(chart.svg())
    numbers = [float(text.replace("−", "-")) for text in shown if re.fullmatch(r"[-−\d.]+", text)]
    ticks = numbers[numbers.index(3.0) + 1 :]
    assert min(ticks) <= low
    assert max(ticks) >= high
    assert 2 <= len(ticks) <= 8
    assert {"x", "nats", "s"} <= set(shown)


@pytest.mark.parametrize(
    ("value", "step", "text"),
    [(0.25, 0.25, "0.25"), (1000, 500, "1,000"), (20_000, 5_000, "20k"), (3e-4, 1e-4, "3e-4"),
     (1e-17, 0.1, "0")],
)  # fmt: skip
def test_tick_labels(value: float, step: float, text: str) -> None:
    assert tick_text(value, step=step) == text


def test_gaps_faint_lines_and_odd_names() -> None:
    series = [
        Series("raw", [(1, 1.0), (2, 2.0)], "ar", faint=True),
        Series("a$_$ <b>\x00\ud800 漢", [(1, 1.0), (2, None), (3, 2.0), (4, 1.0)], "quiet", True),
    ]
    svg = Chart("<t>", series, "x", "y", reference=(0.5, "half")).svg()
    shown = texts(svg)
    assert "a$_$ <b>␀\\ud800 漢" in shown
    assert "half" in shown
    assert "raw" not in shown
    assert svg == Chart("<t>", series, "x", "y", reference=(0.5, "half")).svg()
    assert "var(--quiet)" in svg
    assert "nan" not in svg
