"""The report is rebuilt after each eval and at the end, from the files alone."""

from tracker_data import EVAL_ROWS, steps

from pipeline.training.moments import Together
from pipeline.training.state import TrainState
from pipeline.training.trackers.metrics import MetricsFiles
from pipeline.training.trackers.report import Report


def test_report_follows_the_files(tmp_path):
    trackers = Together([MetricsFiles(tmp_path), Report(tmp_path, print)])
    page = tmp_path / "report.html"
    trackers.on_start(TrainState())
    for metrics in steps(1, 3):
        trackers.on_step(metrics)
    assert not page.exists()
    trackers.on_eval([{**row, "step": 3} for row in EVAL_ROWS])
    after_eval = page.read_text(encoding="utf-8")
    assert "2.00" in after_eval  # tokens per forward of the eval
    for metrics in steps(4, 5):
        trackers.on_step(metrics)
    trackers.on_end(TrainState(step=5), finished=True)
    at_end = page.read_text(encoding="utf-8")
    assert at_end != after_eval
    assert "5 steps" in at_end


def test_a_run_without_a_step_has_no_report(tmp_path):
    trackers = Together([MetricsFiles(tmp_path), Report(tmp_path, print)])
    trackers.on_start(TrainState())
    trackers.on_end(TrainState(), finished=False)
    assert not (tmp_path / "report.html").exists()


def test_a_run_that_was_cut_back_to_nothing_has_no_report(tmp_path):
    """Killed before its first checkpoint, then stopped before its first step."""
    trackers = Together([MetricsFiles(tmp_path), Report(tmp_path, print)])
    trackers.on_start(TrainState())
    trackers.on_step(next(steps(1, 1)))
    trackers.on_start(TrainState())
    trackers.on_end(TrainState(), finished=False)
    assert not (tmp_path / "report.html").exists()


def test_a_page_that_cannot_be_written_ends_no_training(tmp_path):
    said: list[str] = []
    trackers = Together([MetricsFiles(tmp_path), Report(tmp_path, said.append)])
    trackers.on_start(TrainState())
    trackers.on_step(next(steps(1, 1)))
    (tmp_path / "report.html").mkdir()
    trackers.on_eval(EVAL_ROWS)
    assert len(said) == 1
    assert said[0].startswith("warning: report.html could not be written")
