"""`metrics.jsonl` and the eval file: appended whole, and cut back when a run resumes."""

import json
from pathlib import Path

import pytest
from tracker_data import EVAL_ROWS, steps

from pipeline.training.state import TrainState
from pipeline.training.trackers.metrics import MetricsFiles, cut_after


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def record(run_dir: Path, first: int, last: int) -> None:
    """One start of a run with an eval at every even step."""
    files = MetricsFiles(run_dir)
    files.on_start(TrainState(step=first - 1))
    for metrics in steps(first, last):
        files.on_step(metrics)
        if metrics.step % 2 == 0:
            files.on_eval([{**row, "step": metrics.step} for row in EVAL_ROWS])


def test_every_step_is_a_line(tmp_path):
    record(tmp_path, 1, 5)
    assert read(tmp_path / "metrics.jsonl") == [metrics.to_dict() for metrics in steps(1, 5)]
    rows = read(tmp_path / "evals" / "decode_speed.jsonl")
    assert [row["step"] for row in rows] == [2] * 4 + [4] * 4
    assert rows[:4] == [{**row, "step": 2} for row in EVAL_ROWS]


@pytest.mark.parametrize("restored", [0, 1, 2, 5])
def test_a_resume_leaves_the_file_of_an_uninterrupted_run(tmp_path, restored):
    """Steps after the restored one are cut and written anew; none stands twice."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    record(whole, 1, 6)
    record(resumed, 1, 5)
    record(resumed, restored + 1, 6)
    for name in ("metrics.jsonl", "evals/decode_speed.jsonl"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("kept", [1, 20, -2])
def test_a_half_written_last_line_is_dropped(tmp_path, kept):
    """Even where it belongs to a step that the checkpoint holds."""
    record(tmp_path, 1, 3)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + lines[2][:kept])
    record(tmp_path, 4, 4)
    assert [row["step"] for row in read(path)] == [1, 2, 4]


def test_a_last_line_without_its_end_is_kept_and_ended(tmp_path):
    record(tmp_path, 1, 2)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    record(tmp_path, 3, 3)
    assert [row["step"] for row in read(path)] == [1, 2, 3]


@pytest.mark.parametrize("garbage", [b"\0" * 40, b"\xff\xfe\x80", b"12", b"null", b"{}"])
def test_what_a_crash_of_the_machine_left_is_dropped(tmp_path, garbage):
    record(tmp_path, 1, 2)
    path = tmp_path / "metrics.jsonl"
    with path.open("ab") as file:
        file.write(garbage)
    record(tmp_path, 3, 3)
    assert [row["step"] for row in read(path)] == [1, 2, 3]


def test_cutting_leaves_no_other_file(tmp_path):
    record(tmp_path, 1, 3)
    cut_after(tmp_path / "metrics.jsonl", 1)
    cut_after(tmp_path / "absent.jsonl", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evals", "metrics.jsonl"]
    assert len(read(tmp_path / "metrics.jsonl")) == 1
