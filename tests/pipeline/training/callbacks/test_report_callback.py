"""The report is rebuilt after each eval and at the end, from the files alone."""

from callback_data import EVAL_ROWS, steps

from pipeline.training.callbacks import Callbacks
from pipeline.training.callbacks.metrics import MetricsFiles
from pipeline.training.callbacks.report import Report
from pipeline.training.state import TrainState


def test_report_follows_the_files(tmp_path):
    callbacks = Callbacks([MetricsFiles(tmp_path), Report(tmp_path)])
    page = tmp_path / "report.html"
    callbacks.on_start(TrainState())
    for metrics in steps(1, 3):
        callbacks.on_step(metrics)
    assert not page.exists()
    callbacks.on_eval([{**row, "step": 3} for row in EVAL_ROWS])
    after_eval = page.read_text(encoding="utf-8")
    assert "2.00" in after_eval  # tokens per forward of the eval
    for metrics in steps(4, 5):
        callbacks.on_step(metrics)
    callbacks.on_end(TrainState(step=5), finished=True)
    at_end = page.read_text(encoding="utf-8")
    assert at_end != after_eval
    assert "5 steps" in at_end


def test_a_run_without_a_step_has_no_report(tmp_path):
    callbacks = Callbacks([MetricsFiles(tmp_path), Report(tmp_path)])
    callbacks.on_start(TrainState())
    callbacks.on_end(TrainState(), finished=False)
    assert not (tmp_path / "report.html").exists()


def test_a_run_that_was_cut_back_to_nothing_has_no_report(tmp_path):
    """Killed before its first checkpoint, then stopped before its first step."""
    callbacks = Callbacks([MetricsFiles(tmp_path), Report(tmp_path)])
    callbacks.on_start(TrainState())
    callbacks.on_step(next(steps(1, 1)))
    callbacks.on_start(TrainState())
    callbacks.on_end(TrainState(), finished=False)
    assert not (tmp_path / "report.html").exists()
