"""Rates from generations written by hand."""

import pytest

from pipeline.decoding import Generation
from pipeline.evals.totals import Cost


def generation(tokens: list[int], accepted: list[int], seconds: float = 1.0) -> Generation:
    """K = 4: every step has three drafts to verify."""
    return Generation(
        tokens=tokens, forwards=1 + len(accepted), accepted=accepted, seconds=seconds,
        drafts=[3] * len(accepted),
    )  # fmt: skip


def test_acceptance_by_position():
    """K = 4. Steps accept 1, 2, 4, 4 and 3 tokens, d_0 among them.

    Position 1 was looked at in all five and accepted in four, position 2 looked at in four and
    accepted in three, position 3 looked at in three and accepted in two.
    """
    totals = Cost.of(generation(list(range(15)), [1, 2, 4, 4, 3]), matches=True)
    assert totals.acceptance(4) == [4 / 5, 3 / 4, 2 / 3]
    assert totals.tokens_per_forward == 15 / 6


def test_positions_that_no_step_reached_have_no_rate():
    totals = Cost.of(generation([1, 2, 3], [1, 1]), matches=True)
    assert totals.acceptance(4) == [0.0, None, None]
    assert Cost.of(generation([1, 2, 3], []), matches=True).acceptance(2) == [None]
    assert totals.acceptance(1) == []


def test_steps_without_a_draft_count_for_no_position():
    run = generation([1, 2, 3, 4, 5], [2, 1, 1])
    run.drafts = [3, 0, 1]
    assert Cost.of(run, matches=True).acceptance(4) == [1 / 2, 0.0, None]


def test_time_is_counted_by_query_tokens():
    run = generation([1, 2, 3], [1, 1, 1])
    run.steps = [(20, 1.0), (5, 0.25), (20, 2.0)]
    totals = Cost.of(run, matches=True)
    assert (totals + totals).seconds_by_queries() == {"5": 0.25, "20": 1.5}
    assert Cost().seconds_by_queries() is None


def test_distinct_fourgrams():
    loop = Cost.of(generation([7, 8] * 6, []), matches=True)
    assert (loop.fourgrams, loop.distinct_fourgrams) == (9, 2)
    assert loop.distinct_4grams == pytest.approx(2 / 9)
    assert Cost.of(generation(list(range(9)), []), matches=True).distinct_4grams == 1.0
    assert Cost.of(generation([1, 2, 3], []), matches=True).distinct_4grams is None


def test_the_same_text_after_two_prompts_is_not_repetition():
    totals = Cost.of(generation([1, 2, 3, 4, 5], []), matches=True)
    assert (totals + totals).distinct_4grams == 1.0


def test_sums_weigh_by_tokens_forwards_and_seconds():
    short = Cost.of(generation([1] * 4, [3], seconds=1.0), matches=True)
    long = Cost.of(generation([1] * 20, [1] * 7, seconds=3.0), matches=False)
    total = Cost() + short + long
    assert (total.answers, total.tokens, total.forwards, total.matches) == (2, 24, 10, 1)
    assert total.tokens_per_forward == 2.4
    assert total.tokens_per_second == 6.0
    assert total.acceptance(4) == [1 / 8, 1.0, 0.0]
    assert (short + long).acceptance(4) == (long + short).acceptance(4)
