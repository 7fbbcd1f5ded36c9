"""The report's arithmetic: smoothing, thinning, ticks and numbers as text."""

import random

import pytest

from pipeline.report.plots import MAX_DRAWN_POINTS, running_mean, thin
from pipeline.report.svg import nice_ticks
from pipeline.report.wording import compact, percent, tick_text


def test_thin_keeps_the_extremes_and_few_points() -> None:
    rng = random.Random(3)
    points = [(step, rng.gauss(0, 1)) for step in range(50_000)]
    kept = thin(points)
    assert len(kept) <= MAX_DRAWN_POINTS
    assert kept == sorted(kept)
    assert set(kept) <= set(points)
    values = [y for _, y in points]
    assert {min(values), max(values)} <= {y for _, y in kept}


def test_running_mean_against_the_sum_written_out() -> None:
    rng = random.Random(4)
    points = [(x, None if rng.random() < 0.2 else rng.uniform(-1, 1)) for x in range(40)]
    for index, (_, mean) in enumerate(running_mean(points, 7)):
        reach = min(3, index, 39 - index)
        near = [y for _, y in points[index - reach : index + reach + 1] if y is not None]
        if points[index][1] is None:
            assert mean is None
        else:
            assert mean == pytest.approx(sum(near) / len(near))


@pytest.mark.parametrize(("low", "high"), [(0, 1), (3.71, 8.2), (1, 300), (-2, 2), (5, 5), (0, 0)])
def test_ticks_cover_the_range(low: float, high: float) -> None:
    ticks = nice_ticks(low, high, 5)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert 2 <= len(ticks) <= 8


@pytest.mark.parametrize(
    ("count", "text"), [(950, "950"), (1_834_240, "1.83M"), (999_600, "1M"), (1.54e9, "1.54B")]
)
def test_counts_in_three_figures(count: float, text: str) -> None:
    assert compact(count) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [(1.0, "100 %"), (0.999, "99.9 %"), (0.0, "0 %"), (0.001, "0.1 %"), (0.5, "50 %")],
)
def test_only_all_is_100_percent(share: float, text: str) -> None:
    assert percent(share) == text


@pytest.mark.parametrize(
    ("value", "step", "text"),
    [(0.25, 0.25, "0.25"), (1000, 500, "1,000"), (20_000, 5_000, "20k"), (3e-4, 1e-4, "3e-4")],
)
def test_tick_labels(value: float, step: float, text: str) -> None:
    assert tick_text(value, step) == text
