"""Choosing the step: the formula against a simulation, the curve, and its file."""

import json
import random

import pytest
from decoding_models import make_model

from pipeline.decoding import choice, latency
from pipeline.decoding.choice import accepted_probabilities, choose, expected, shapes
from pipeline.decoding.latency import LatencyCurve, latency_curve, measure_curve
from pipeline.decoding.step import StepShape

QUERIES = (1, 10, 100)


def curve(per_query: float) -> LatencyCurve:
    """A forward takes 1 and `per_query` for each query beyond the first."""
    times = tuple(1 + per_query * (queries - 1) for queries in QUERIES)
    return LatencyCurve(QUERIES, (100,), (times,), (0.0, 0.0, 0.0))


def simulate(shape: StepShape, acceptance, times: LatencyCurve, tokens: int) -> tuple[float, float]:
    """Tokens per second and per forward of a decoder with these acceptances."""
    rng, made, forwards, seconds, drafted = random.Random(0), 0, 0, 0.0, True
    while made < tokens:
        now = shape if drafted else shape.short
        accepted = 1
        while accepted < now.drafts and rng.random() < acceptance[accepted - 1]:
            accepted += 1
        made, forwards = made + accepted, forwards + 1
        seconds += times.step_seconds(now.num_queries, 1, 100)
        drafted = accepted in now.blocks
    return made / seconds, made / forwards


@pytest.mark.parametrize("blocks", [(1, 2, 3, 4), (1, 4), (1,), (1, 2), (4,), ()])
def test_the_expectation_is_what_a_simulation_finds(blocks):
    acceptance, times, shape = [0.8, 0.6, 0.7], curve(0.05), StepShape(4, 4, blocks)
    found = expected(shape, acceptance, times, 100)
    rate, per_forward = simulate(shape, acceptance, times, 40_000)
    assert found.tokens_per_second == pytest.approx(rate, rel=0.02)
    assert found.tokens_per_forward == pytest.approx(per_forward, rel=0.02)


def test_linear_steps_always_have_a_draft():
    """K + 2K - 1 queries and E tokens a step; the K that pays most, where none is short."""
    acceptance, times = [0.8, 0.6, 0.7], curve(0.05)
    found = expected(StepShape.one_block(4), acceptance, times, 100)
    tokens = 1 + 0.8 + 0.8 * 0.6 + 0.8 * 0.6 * 0.7
    assert found.tokens_per_forward == pytest.approx(tokens)
    assert found.tokens_per_second == pytest.approx(tokens / (1 + 0.05 * (4 + 7 - 1)))
    best = choose([0.9] * 7, curve(0.02), 100, linear=True)
    assert best.shape.linear
    assert "one block for all counts, " in str(best)
    assert choose([0.9] * 7, curve(1.0), 100, linear=True).method == "ar"


def test_accepted_probabilities():
    assert accepted_probabilities([0.5, 0.25]) == [0.5, 0.375, 0.125]
    assert accepted_probabilities([]) == [1.0]


def test_what_pays_depends_on_the_machine():
    free, dear, between = curve(0.0), curve(1.0), curve(0.02)
    acceptance = [0.9] * 7
    assert choose(acceptance, free, 100).shape == StepShape.full(8)
    plain = choose(acceptance, dear, 100)
    assert (plain.method, plain.shape) == ("ar", StepShape(1))
    assert "drafting does not pay" in str(plain)
    some = choose(acceptance, between, 100)
    assert some.method == "tidar"
    assert some.shape == StepShape(8, 8, (8,))  # all drafts are good nearly half of the time
    assert f"K = {some.shape.block_size}" in str(some)
    every = [expected(shape, acceptance, between, 100) for shape in shapes(acceptance)]
    assert some.tokens_per_second == max(option.tokens_per_second for option in every)
    assert {option.shape.blocks for option in every} >= {(), (8,), (1, 8), (1, 2, 8)}
    assert all(shape.blocks[0] == 1 for shape in shapes(acceptance, batch_size=2))
    # Rows of a batch share a forward, and with it what is free in it.
    one, four = (choose(acceptance, free, 100, batch_size=size) for size in (1, 4))
    assert four.tokens_per_second == pytest.approx(4 * one.tokens_per_second)
    assert choose(acceptance, curve(0.2), 100, batch_size=4).method == "ar"
    assert choose(acceptance, dear, 100, drafting=True).shape.block_size == 8


def test_times_lie_on_straight_lines():
    times = LatencyCurve((1, 3), (100, 200), ((1.0, 2.0), (3.0, 6.0)), (0.0, 0.5))
    assert times.step_seconds(1, 1, 50) == 1.0
    assert times.step_seconds(2, 1, 150) == 3.0
    assert times.step_seconds(5, 3, 100) == 3.5
    assert times.step_seconds(3, 2, 300) == 10.25


def test_a_curve_is_measured_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = make_model(max_positions=300)
    calls = []

    def once(model):
        calls.append(1)
        return measure_curve(model, rounds=1)

    monkeypatch.setattr(latency, "measure_curve", once)
    first = latency_curve(model)
    assert latency_curve(model) == first
    assert len(calls) == 1
    assert first.cached == (128, 299)
    assert all(time > 0 for row in first.forward for time in row)
    (path,) = (tmp_path / "tidar-pretrain").iterdir()
    path.write_text(json.dumps({"queries": 3}))  # a damaged file is made anew
    latency_curve(model)
    assert len(calls) == 2
    latency_curve(make_model(num_layers=1))
    assert len(calls) == 3
    assert choice.choose([0.5], first, 100).tokens_per_second > 0
