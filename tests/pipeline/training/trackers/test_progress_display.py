"""What is printed: lines where there is no terminal, a bar where there is one."""

import io
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from tracker_data import EVAL_ROWS, steps

from pipeline.data.order import TrainState
from pipeline.training.trackers import progress
from pipeline.training.trackers.progress import ProgressDisplay, describe_end, describe_run


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
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    lines = show(plain(), 1, 6, 6, log_every_s=10).splitlines()
    assert [line.split()[1] for line in lines] == ["1/6", "4/6", "6/6"]


def test_evals_are_one_line_for_each_temperature_of_tidar():
    lines = show(plain(), 1, 1, 1, log_every_s=0, evals=EVAL_ROWS).splitlines()
    assert lines[1:] == [
        f"eval at step 0, temperature {temperature}: 2.00 tokens/forward (2.25 expected on "
        "held-out text, a table of pairs 1.50), 0.75x the speed of AR, first draft accepted 62%, "
        "held-out AR loss 3.250 (unigram entropy 5.750)"
        for temperature in (0, 1)
    ]


@pytest.mark.parametrize(
    ("values", "there", "not_there"),
    [
        ({"ar_loss": 5.5}, "accepts by chance: its tokens/forward say nothing yet", "speed of AR"),
        ({"distinct_4grams": 0.1}, "; the text repeats itself (10% distinct 4-grams)", "chance"),
        ({"expected_tokens_per_forward": None}, "2.00 tokens/forward, 0.75x", "expected"),
    ],
)
def test_an_eval_that_says_nothing_is_not_praised(values, there, not_there):
    text = show(plain(), 1, 1, 1, log_every_s=0, evals=[{**EVAL_ROWS[2], **values}])
    assert there in text
    assert not_there not in text


@pytest.mark.parametrize(
    ("capability", "device", "precision", "slow"),
    [
        ("AVX2", "cpu", "bf16", True),
        ("AVX2", "cpu", "fp32", False),
        ("AVX2", "cuda", "bf16", False),
        ("AVX512", "cpu", "bf16", False),
    ],
)
def test_a_run_says_what_it_is(monkeypatch, capability, device, precision, slow):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    settings = SimpleNamespace(
        manifest=SimpleNamespace(sequence_length=256, train=SimpleNamespace(sequences=1000)),
        mix=(), global_batch_size=32, steps=100, freeze_base=True, precision=precision,
        deepspeed=SimpleNamespace(stage=2), run_dir=Path("runs/x"),
        wandb=SimpleNamespace(mode="offline"),
    )  # fmt: skip
    config = SimpleNamespace(num_parameters=5000, num_drafting_parameters=200)
    first, second, third = describe_run(settings, config, 2, torch.device(device)).splitlines()
    assert first.startswith(f"5,000 parameters, 200 of them trained; 2 processes on {device}, ZeRO")
    assert first.endswith(precision) == (not slow)
    assert ("this CPU only emulates" in first) == slow
    assert second == (
        "100 steps of 32 sequences of 256 tokens (8,192 a step), 3.2 times the 1,000 sequences of "
        "the data"
    )
    assert third.startswith("runs/x: report.html")
    assert "wandb sync runs/x/wandb/offline-run-*" in describe_end(settings, 100)
    settings.wandb.mode = "disabled"
    assert "wandb sync" not in describe_end(settings, 100)


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
