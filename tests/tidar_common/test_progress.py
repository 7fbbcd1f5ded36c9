"""What is said while nothing else is."""

import pytest

from tidar_common import progress
from tidar_common.progress import Doing


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

    monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.now)
    monkeypatch.setenv("RANK", "1")  # no thread: the test polls
    return Clock


def test_long_work_is_told_every_ten_seconds_of_silence(clock):
    lines: list[str] = []
    doing = Doing()
    doing.tell = lines.append
    doing.poll()
    doing("in a step")
    for second in range(1, 35):
        clock.now += 1
        doing.part("micro-batch", 1 + second // 10, 16)
        doing.poll()
    assert lines == [
        f"... in a step: micro-batch {n} of 16, for {s} s" for n, s in ((2, 10), (3, 20), (4, 30))
    ]
    doing("in an eval")  # something else: its own ten seconds
    clock.now += 9
    doing.poll()
    assert len(lines) == 3
    clock.now += 1
    doing.poll()
    assert lines[3:] == ["... in an eval, for 10 s"]


def test_what_is_said_puts_it_off_and_the_end_ends_it(clock):
    lines: list[str] = []
    doing = Doing()
    doing.tell = lines.append
    doing("loading")
    clock.now += 8
    doing.spoke()
    clock.now += 8
    doing.poll()
    assert lines == []
    doing("")
    clock.now += 100
    doing.poll()
    assert lines == []


def test_the_thread_tells_by_itself(monkeypatch, capsys):
    monkeypatch.setattr(progress, "SILENCE_S", 0.05)
    monkeypatch.setattr(progress, "POLLED_EVERY_S", 0.01)
    monkeypatch.setenv("RANK", "0")
    doing, lines = Doing(), []
    doing.tell = lines.append
    doing("working")
    for _ in range(500):
        if lines:
            break
        progress.time.sleep(0.01)
    doing("")
    assert lines[0].startswith("... working, for ")
