"""`metrics.jsonl` and the eval file: appended whole, and cut back when a run resumes."""

import json
from pathlib import Path

import pytest
from tracker_data import EVAL_ROWS, steps

from pipeline.data.order import TrainState
from pipeline.training.moments import Together, make_event
from pipeline.training.trackers.metrics import EventsFile, MetricsFiles, cut_after
from pipeline.training.trackers.wandb import Wandb, WandbConfig


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


class FakeRun:
    def __init__(self) -> None:
        self.alerts: list[str] = []
        self.logged: list[dict] = []

    def alert(self, title: str, text: str) -> None:
        self.alerts.append(f"{title}: {text}")

    def log(self, values: dict) -> None:
        self.logged.append(values)


def test_events_are_written_and_alerted(tmp_path):
    said: list[str] = []
    wandb = Wandb(tmp_path, WandbConfig(), {}, said.append, [])
    wandb.run = FakeRun()
    both = Together([EventsFile(tmp_path), wandb])
    both.on_event(make_event("checkpoint_saved", 4, "step-00000004", held_s=0.5, name="x"))
    both.on_event(make_event("step_skipped", 5, "loss is not finite", first_sequence=32))
    rows = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [list(row)[:4] for row in rows] == [["time", "event", "step", "message"]] * 2
    assert [row["event"] for row in rows] == ["checkpoint_saved", "step_skipped"]
    assert wandb.run.alerts == [f"{tmp_path.name}: step skipped: loss is not finite"]
    assert wandb.run.logged == [
        {"step": 4, "events/checkpoint_saved/held_s": 0.5},
        {"step": 5, "events/step_skipped/first_sequence": 32},
    ]
    assert said == []


def test_a_resume_keeps_the_history(tmp_path):
    file = EventsFile(tmp_path)
    file.on_event(make_event("straggler", 50, "rank 1 is slow"))
    EventsFile(tmp_path).on_start(TrainState(step=10))
    assert file.path.read_text().count("\n") == 1
