"""The page of a run that trains is drawn beside it, one at a time, and never stops it."""

import pytest
from tracker_data import EVAL_ROWS, steps

from pipeline.data.order import TrainState
from pipeline.training.moments import Together
from pipeline.training.trackers import report as report_tracker
from pipeline.training.trackers.metrics import MetricsFiles
from pipeline.training.trackers.report import Report


def fail(text: str) -> None:
    raise AssertionError(text)


@pytest.fixture
def report(tmp_path):
    return Report(tmp_path, fail, nice=0)


@pytest.fixture
def trackers(report, tmp_path):
    together = Together([MetricsFiles(tmp_path), report])
    together.on_start(TrainState())
    return together


def train(trackers, first: int, last: int) -> None:
    for metrics in steps(first, last):
        trackers.on_step(metrics)


def test_report_follows_the_files(trackers, report, tmp_path):
    page = tmp_path / "report.html"
    train(trackers, 1, 3)
    assert report.drawing is None
    trackers.on_eval([{**row, "step": 3} for row in EVAL_ROWS])
    assert report.drawing.wait() == 0
    after_eval = page.read_text(encoding="utf-8")
    assert "2.00" in after_eval  # tokens per forward of the eval
    train(trackers, 4, 5)
    assert report.drawing is None, "nothing is new but steps"
    trackers.on_end(TrainState(step=5), finished=True)
    at_end = page.read_text(encoding="utf-8")
    assert at_end != after_eval
    assert "5 steps" in at_end


def test_one_process_at_a_time_and_the_last_page_has_all(trackers, report, tmp_path):
    train(trackers, 1, 1)
    trackers.on_eval([{**row, "step": 1} for row in EVAL_ROWS])
    first = report.drawing
    trackers.on_eval([{**row, "step": 1} for row in EVAL_ROWS])
    assert report.drawing is first
    first.wait()
    train(trackers, 2, 2)
    second = report.drawing
    assert second is not first, "the eval in the meantime is drawn once the first has ended"
    trackers.on_end(TrainState(step=2), finished=True)
    assert second.returncode != 0, "what is outdated is ended, not waited for"
    assert "2 steps" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not list(tmp_path.glob(".report.html*")), "nothing half-written stays"


def test_a_run_without_a_step_has_no_report(trackers, tmp_path):
    trackers.on_end(TrainState(), finished=False)
    assert not (tmp_path / "report.html").exists()


def test_a_run_that_was_cut_back_to_nothing_has_no_report(trackers, tmp_path):
    """Killed before its first checkpoint, then stopped before its first step."""
    train(trackers, 1, 1)
    trackers.on_start(TrainState())
    trackers.on_end(TrainState(), finished=False)
    assert not (tmp_path / "report.html").exists()


def test_a_page_that_cannot_be_written_ends_no_training(trackers, report, tmp_path):
    said: list[str] = []
    report.say = said.append
    train(trackers, 1, 1)
    (tmp_path / "report.html").mkdir()
    trackers.on_eval(EVAL_ROWS)
    report.drawing.wait()
    train(trackers, 2, 3)
    assert len(said) == 1
    assert said[0].startswith("warning: report.html could not be written (")
    assert "Is a directory" in said[0]


def test_a_process_that_hangs_ends_itself(monkeypatch, tmp_path):
    said: list[str] = []
    draw, rest = report_tracker.DRAW.split("runpy.run_module")
    assert "pipeline.status" in rest
    monkeypatch.setattr(report_tracker, "DRAW", f"{draw}import time; time.sleep(600)")
    report = Report(tmp_path, said.append, limit_s=1, nice=0)
    report.on_eval(EVAL_ROWS)
    report.drawing.wait()
    train(report, 1, 1)
    assert len(said) == 1
    assert "(it took more than 1 s)" in said[0]
