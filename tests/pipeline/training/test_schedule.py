"""The learning rate at the moments that matter."""

import pytest

from pipeline.training.schedule import ScheduleConfig, learning_rate


def test_warms_up_peaks_and_ends_at_the_final_share():
    schedule = ScheduleConfig(warmup_steps=10, final_share=0.1)
    rates = [learning_rate(step, 101, 2.0, schedule) for step in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[100] == pytest.approx(0.2)
    assert rates[55] == pytest.approx((2.0 + 0.2) / 2)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_no_warmup_and_one_step():
    assert learning_rate(0, 1, 1.0, ScheduleConfig(warmup_steps=0)) == 1.0


def test_bad_values():
    with pytest.raises(ValueError, match="warmup_steps"):
        ScheduleConfig(warmup_steps=-1)
    with pytest.raises(ValueError, match="final_share"):
        ScheduleConfig(final_share=2.0)
