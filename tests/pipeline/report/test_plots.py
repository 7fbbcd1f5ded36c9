"""Curves with many steps: smoothing and thinning."""

import random

import pytest

from pipeline.report.plots import MAX_DRAWN_POINTS, running_mean, thin


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
