"""Rebuilds `report.html` after each eval and at the end."""

from pathlib import Path
from typing import Any

from pipeline.report import build_report
from pipeline.training.callbacks.base import Callback
from pipeline.training.state import TrainState


class Report(Callback):
    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def on_eval(self, rows: list[dict[str, Any]]) -> None:
        build_report(self.run_dir)

    def on_end(self, state: TrainState, finished: bool) -> None:
        metrics = self.run_dir / "metrics.jsonl"
        if metrics.exists() and metrics.stat().st_size:  # a run stopped before its first step
            build_report(self.run_dir)
