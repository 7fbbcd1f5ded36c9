"""What is printed: lines where there is no terminal, a bar where there is one."""

import io
import re

from rich.console import Console
from tracker_data import EVAL_ROWS, steps

from pipeline.data.order import TrainState
from pipeline.training.trackers import progress
from pipeline.training.trackers.progress import ProgressDisplay


def show(console: Console, first: int, last: int, total: int, log_every_s: float, evals=()) -> str:
    display = ProgressDisplay(total, console, log_every_s)
    display.on_start(TrainState(step=first - 1))
    for metrics in steps(first, last):
        display.on_step(metrics)
    display.on_eval(list(evals))
    display.on_end(TrainState(step=last), finished=last == total)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def plain() -> Console:
    return Console(file=io.StringIO(), width=60, force_terminal=False)


def test_lines_without_a_terminal():
    """Steps take 2 s each, so after the first of four there are 6 s left."""
    lines = show(plain(), 1, 4, 4, log_every_s=0).splitlines()
    assert lines == [
        "step 1/4  loss 4.000  ar 3.000  diffusion 5.000  50 tokens/s  0:06 left",
        "step 2/4  loss 2.000  ar 1.500  50 tokens/s  0:04 left",
        "step 3/4  loss 1.333  ar 1.000  diffusion 1.667  50 tokens/s  0:02 left",
        "step 4/4  loss 1.000  ar 0.750  50 tokens/s  0:00 left",
    ]


def test_time_left_after_a_resume_counts_only_this_start():
    lines = show(plain(), 101, 101, 104, log_every_s=0).splitlines()
    assert lines[0].startswith("step 101/104 ")
    assert lines[0].endswith("0:06 left")


def test_lines_keep_their_distance_but_the_last_step_is_always_shown(monkeypatch):
    clock = iter([1000.0, 1001.0, 1009.0, 1010.0, 1012.0, 1013.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    lines = show(plain(), 1, 6, 6, log_every_s=10).splitlines()
    assert [line.split()[1] for line in lines] == ["1/6", "4/6", "6/6"]


def test_evals_are_one_line_for_each_temperature_of_tidar():
    lines = show(plain(), 1, 1, 1, log_every_s=0, evals=EVAL_ROWS).splitlines()
    assert lines[1:] == [
        f"eval at step 0, temperature {temperature}: 2.00 tokens/forward, 0.75x the speed of AR, "
        "first draft accepted 62%, held-out AR loss 3.250 (unigram entropy 5.750)"
        for temperature in (0, 1)
    ]


def test_an_eval_that_never_looked_at_a_draft_says_no_more_than_it_knows():
    row = {**EVAL_ROWS[2], "acceptance_by_position": [None, None]}
    text = show(plain(), 1, 1, 1, log_every_s=0, evals=[row])
    assert "first draft" not in text
    assert "2.00 tokens/forward" in text


def test_a_terminal_gets_a_bar_that_ends():
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)
    text = show(console, 3, 5, 8, log_every_s=0)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert "step 5/8" in shown
    assert "loss 0.800  ar 0.600  diffusion 1.000  50 tokens/s  0:06 left" in shown
    assert text.count("\x1b[?25h") == text.count("\x1b[?25l") == 1, "the cursor must come back"
