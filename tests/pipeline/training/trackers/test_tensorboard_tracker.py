"""TensorBoard's own reader finds the numbers of the metrics file; its failures stop nothing."""

import json
import sys

import pytest
from tracker_data import EVAL_ROWS, steps

from pipeline.data.order import TrainState
from pipeline.training import settings
from pipeline.training.moments import Together
from pipeline.training.trackers.metrics import MetricsFiles, eval_values
from pipeline.training.trackers.tensorboard import TensorBoard, is_installed
from tidar_common.errors import UserError

needs_tensorboard = pytest.mark.skipif(
    not is_installed(), reason="tensorboard is not installed: pip install -e '.[tensorboard]'"
)


def run(run_dir, first: int, last: int, say) -> None:
    trackers = Together([MetricsFiles(run_dir), TensorBoard(run_dir, say)])
    trackers.on_start(TrainState(step=first - 1))
    for metrics in steps(first, last):
        trackers.on_step(metrics)
    trackers.on_eval([{**row, "step": last} for row in EVAL_ROWS])
    trackers.on_end(TrainState(step=last), finished=True)


@needs_tensorboard
def test_a_continued_run_is_one_curve_with_the_numbers_of_the_metrics_file(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    said: list[str] = []
    run(tmp_path, 1, 4, said.append)
    run(tmp_path, 3, 5, said.append)  # from a checkpoint two steps back
    assert said == []
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    for name, key in (("train/loss", "loss"), ("system/step_seconds", "step_seconds"),
                      ("tokens", "tokens")):  # fmt: skip
        curve = [(event.step, event.value) for event in found.Scalars(name)]
        assert curve == [(row["step"], pytest.approx(row[key])) for row in rows]
    for row in EVAL_ROWS:
        for name, value in eval_values(row).items():
            assert found.Scalars(name)[-1].value == pytest.approx(value), name
    assert "step" not in found.Tags()["scalars"]


def test_a_failure_is_told_once_and_stops_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    said: list[str] = []
    run(tmp_path, 1, 3, said.append)
    assert len(said) == 1
    assert said[0].startswith("warning: TensorBoard could not start")
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_it_is_refused_before_the_start_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(settings, "tensorboard_is_installed", lambda: False)
    with pytest.raises(UserError, match=r"tensorboard: .* pip install"):
        settings.check_tensorboard(True)
    settings.check_tensorboard(False)
