"""The arithmetic of benchmarks, and that work is interleaved and memory counted. No clock times."""

import pytest
import torch

from bench.measure import Samples, interleaved, peak_bytes, ratio, spread

CPU = torch.device("cpu")


def test_spread():
    assert spread([3.0, 1.0, 10.0]) == {"min": 1.0, "median": 3.0, "max": 10.0}


def test_ratio_is_of_medians_with_the_spread_of_rounds():
    slow = Samples([4.0, 6.0, 20.0], [2.0, 2.0, 2.0])
    fast = Samples([2.0, 2.0, 4.0], [1.0, 4.0, 2.0])
    result = ratio(slow, fast, at_most=2.5)
    assert result["wall"]["of_medians"] == 3.0
    assert result["wall"]["per_round"] == {"min": 2.0, "median": 3.0, "max": 5.0}
    assert result["cpu"]["of_medians"] == 1.0
    assert result["cpu"]["per_round"] == {"min": 0.5, "median": 1.0, "max": 2.0}
    assert result["at_most"] == 2.5
    assert "at_least" not in result


def test_rounds_of_different_numbers_are_refused():
    with pytest.raises(ValueError, match="zip"):
        ratio(Samples([1.0, 2.0], [1.0, 2.0]), Samples([1.0], [1.0]))


def test_variants_take_turns_and_warmup_is_not_counted():
    calls = []
    samples = interleaved(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
        rounds=2,
        warmup=1,
        device=CPU,
    )
    assert calls == ["a", "b"] * 3
    assert [len(own.wall_seconds) for own in samples.values()] == [2, 2]
    assert [len(own.cpu_seconds) for own in samples.values()] == [2, 2]


def test_peak_is_the_most_held_at_once():
    megabyte = 1 << 20

    def work() -> None:
        first = torch.empty(2 * megabyte, dtype=torch.uint8)
        del first
        both = [torch.empty(3 * megabyte, dtype=torch.uint8) for _ in range(2)]
        del both
        torch.empty(megabyte, dtype=torch.uint8)

    assert peak_bytes(work, CPU) == pytest.approx(6 * megabyte, rel=0.01)
