"""Rebuilds `report.html` after each eval and at the end."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.report import build_report
from pipeline.training.moments import Tracker
from pipeline.training.state import TrainState
from tidar_common.run_files import METRICS


class Report(Tracker):
    """A page that cannot be drawn is said so and ends no training."""

    def __init__(self, run_dir: Path, say: Callable[[str], None]) -> None:
        self.run_dir = run_dir
        self.say = say

    def on_eval(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self._build()

    def on_end(self, state: TrainState, finished: bool) -> None:
        metrics = self.run_dir / METRICS
        if metrics.exists() and metrics.stat().st_size:  # a run stopped before its first step
            self._build()

    def _build(self) -> None:
        try:
            build_report(self.run_dir)
        except Exception as error:
            self.say(
                f"warning: report.html could not be written ({error}); training goes on, and "
                f"tidar-status {self.run_dir} --report draws it later"
            )
