"""Choosing the step: the formula against a simulation, the curve, and its file."""

import json
import random

import pytest
from decoding_models import make_model

from pipeline.decoding import latency
from pipeline.decoding.choice import (
    Acceptance,
    Conditions,
    accepted_probabilities,
    choose,
    expected,
    shapes,
)
from pipeline.decoding.latency import LatencyCurve, latency_curve, measure_curve
from pipeline.decoding.step import StepShape

QUERIES = (1, 10, 100)


def curve(per_query: float) -> LatencyCurve:
    """A forward takes 1 and `per_query` for each query beyond the first."""
    times = tuple(1 + per_query * (queries - 1) for queries in QUERIES)
    return LatencyCurve(QUERIES, (100,), (times,), (1, 4), (0.0, 0.3), (0.1, 0.6))


def known(acceptance, alone=None) -> Acceptance:
    return Acceptance(acceptance, alone)


def at(times: LatencyCurve, **changes) -> Conditions:
    return Conditions(times, 100, **changes)


def simulate(
    shape: StepShape, acceptance: Acceptance, times: LatencyCurve, tokens: int, greedy: bool
) -> tuple[float, float]:
    """Tokens per second and per forward of a decoder with these acceptances."""
    rng, made, forwards, seconds = random.Random(0), 0, 0, 0.0
    drafted, with_block = True, True
    while made < tokens:
        now = shape if drafted else shape.short
        rates = acceptance.block if with_block else acceptance.alone
        accepted = 1
        while accepted < now.tokens and rng.random() < rates[accepted - 1]:
            accepted += 1
        made, forwards = made + accepted, forwards + 1
        seconds += times.step_seconds(now.num_queries, now.tokens, 100, greedy)
        with_block = accepted in now.blocks
        drafted = with_block or shape.sequential
    return made / seconds, made / forwards


@pytest.mark.parametrize("blocks", [(1, 2, 3, 4), (1, 4), (1,), (1, 2), (4,), ()])
@pytest.mark.parametrize(("alone", "greedy"), [(None, True), ([0.5, 0.7, 0.2], False)])
def test_the_expectation_is_what_a_simulation_finds(blocks, alone, greedy):
    """Without a head a short step follows a missing block; with one a draft without it."""
    acceptance, times = known([0.8, 0.6, 0.7], alone), curve(0.05)
    shape = StepShape(4, 4, blocks, sequential=alone is not None)
    found = expected(shape, acceptance, at(times, greedy=greedy))
    rate, per_forward = simulate(shape, acceptance, times, 40_000, greedy)
    assert found.tokens_per_second == pytest.approx(rate, rel=0.02)
    assert found.tokens_per_forward == pytest.approx(per_forward, rel=0.02)


def test_linear_steps_always_have_a_draft():
    """K + 2K - 1 queries and E tokens a step; the K that pays most, where none is short."""
    acceptance, weak = known([0.8, 0.6, 0.7], [0.1] * 3), [0.3] * 7
    found = expected(StepShape.one_block(4), acceptance, at(bare(0.05), linear=True))
    tokens = 1 + 0.8 + 0.8 * 0.6 + 0.8 * 0.6 * 0.7
    assert found.tokens_per_forward == pytest.approx(tokens)
    assert found.tokens_per_second == pytest.approx(tokens / (1 + 0.05 * (4 + 7 - 1)))
    best = choose(known([0.9] * 7, weak), at(bare(0.02), linear=True))
    assert best.shape.linear
    assert "one block for all counts, " in str(best)
    # The head alone where it drafts as well, and plain steps where queries are dear.
    alone = choose(known([0.9] * 7, [0.9] * 7), at(bare(0.02), linear=True))
    assert alone.shape == StepShape(8, 8, (), sequential=True)
    assert choose(known([0.9] * 7, weak), at(bare(1.0), linear=True)).method == "ar"


def test_accepted_probabilities():
    assert accepted_probabilities([0.5, 0.25]) == [0.5, 0.375, 0.125]
    assert accepted_probabilities([]) == [1.0]


def test_what_pays_depends_on_the_machine():
    free, dear, between = (at(bare(cost)) for cost in (0.0, 1.0, 0.02))
    acceptance = known([0.9] * 7)
    assert choose(acceptance, free).shape == StepShape.full(8)
    plain = choose(acceptance, dear)
    assert (plain.method, plain.shape) == ("ar", StepShape(1))
    assert "drafting does not pay" in str(plain)
    some = choose(acceptance, between)
    assert some.method == "tidar"
    assert some.shape == StepShape(8, 8, (8,))  # all drafts are good nearly half of the time
    assert f"K = {some.shape.block_size}" in str(some)
    every = [expected(shape, acceptance, between) for shape in shapes(acceptance)]
    assert some.tokens_per_second == max(option.tokens_per_second for option in every)
    assert {option.shape.blocks for option in every} >= {(), (8,), (1, 8), (1, 2, 8)}
    assert all(shape.blocks[0] == 1 for shape in shapes(acceptance, batch_size=2))
    # Rows of a batch share a forward, and with it what is free in it.
    one, four = (choose(acceptance, at(bare(0.0), batch_size=size)) for size in (1, 4))
    assert four.tokens_per_second == pytest.approx(4 * one.tokens_per_second)
    assert choose(acceptance, at(bare(0.2), batch_size=4)).method == "ar"
    assert choose(acceptance, dear, drafting=True).shape.block_size == 8


def test_a_head_takes_blocks_only_where_they_pay():
    strong, weak = [0.9] * 7, [0.6] * 7
    for cost, alone, blocks in ((0.0, weak, 8), (0.02, strong, 0), (0.05, weak, 2)):
        found = choose(known(strong, alone), at(bare(cost)))
        assert found.shape.sequential
        assert len(found.shape.blocks) == blocks, cost
    assert choose(known(strong, strong), at(bare(0.02)), drafting=True).shape.blocks
    # Where drawing in order takes as long as the forward, fewer places are drafted.
    slow = LatencyCurve(QUERIES, (100,), ((1.0, 1.0, 1.0),), (1, 2, 8), (0, 0.2, 9), (0, 0, 0))
    assert choose(known(weak, weak), at(slow)).shape.block_size < 8
    assert choose(known(weak, weak), at(slow, greedy=False)).shape.block_size == 8


def bare(per_query: float) -> LatencyCurve:
    """As `curve`, with nothing behind the forward."""
    times = tuple(1 + per_query * (queries - 1) for queries in QUERIES)
    return LatencyCurve(QUERIES, (100,), (times,), (1,), (0.0,), (0.0,))


def test_times_lie_on_straight_lines():
    forward = ((1.0, 2.0), (3.0, 6.0))
    times = LatencyCurve((1, 3), (100, 200), forward, (1, 3), (0.0, 0.5), (1.0, 3.0))
    assert times.step_seconds(1, 1, 50) == 1.0
    assert times.step_seconds(2, 1, 150) == 3.0
    assert times.step_seconds(5, 3, 100) == 3.5
    assert times.step_seconds(3, 2, 300) == 10.25
    assert times.step_seconds(1, 2, 50, greedy=False) == 3.0


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
    assert choose(known([0.5]), at(first)).tokens_per_second > 0
    headed = measure_curve(make_model(max_positions=300, draft_rank=4), rounds=1)
    assert headed.sizes == first.sizes == latency.SIZES
    assert all(rest >= 0 for rest in (*headed.greedy, *headed.drawn))
    assert headed.greedy[-1] > 0
