"""What the terminal shows: a live bar where there is one, a line every few seconds elsewhere."""

import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from pipeline.data.order import TrainState
from pipeline.training.moments import ROUTINE, Event, StepMetrics, Tracker
from tidar_common.run_files import EvalRow
from tidar_common.tables import duration


class ProgressDisplay(Tracker):
    """Loss, tokens/s and time left."""

    def __init__(self, steps: int, console: Console, log_every_s: float) -> None:
        self.steps = steps
        self.console = console
        self.log_every_s = log_every_s
        self.bar: Progress | None = None
        self.task: TaskID = TaskID(0)
        self.first_step = 0
        self.training_s = 0.0
        """Seconds spent in steps since this start; evals and saves are not the run's pace."""
        self.last_line = 0.0

    def on_start(self, state: TrainState) -> None:
        self.first_step = state.step
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                console=self.console,
                transient=False,
            )
            self.task = self.bar.add_task("", total=self.steps, completed=state.step)
            self.bar.start()

    def on_rollback(self, state: TrainState) -> None:
        self.first_step, self.training_s = state.step, 0.0

    def on_step(self, metrics: StepMetrics) -> None:
        self.training_s += metrics.step_seconds
        done = metrics.step - self.first_step
        left_s = self.training_s / done * (self.steps - metrics.step)
        text = describe(metrics, left_s)
        if self.bar is not None:
            self.bar.update(self.task, completed=metrics.step, description=text)
            return
        now = time.monotonic()
        if metrics.step == self.steps or now - self.last_line >= self.log_every_s:
            self.last_line = now
            self._line(f"step {metrics.step}/{self.steps}  {text}")

    def on_eval(self, rows: Sequence[EvalRow]) -> None:
        chosen = {row["temperature"]: row for row in rows if row["method"] == "tidar_chosen"}
        for row in rows:
            if row["method"] == "tidar":
                self._line(describe_eval(row, chosen.get(row["temperature"])))

    def on_event(self, event: Event) -> None:
        if event["event"] not in ROUTINE:
            self._line(f"{event['event']} at step {event['step']}: {event['message']}")

    def _line(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def on_end(self, state: TrainState, finished: bool) -> None:
        if self.bar is not None:
            self.bar.stop()


def describe(metrics: StepMetrics, left_s: float) -> str:
    parts = [f"loss {metrics.loss:.3f}", f"ar {metrics.loss_ar:.3f}"]
    if metrics.loss_diffusion is not None:
        parts.append(f"diffusion {metrics.loss_diffusion:.3f}")
    parts.append(f"{metrics.tokens_per_second:,.0f} tokens/s")
    parts.append(f"{duration(left_s)} left")
    return "  ".join(parts)


def describe_eval(row: EvalRow, chosen: EvalRow | None = None) -> str:
    """A line about the `tidar` row of an eval, and the row of the chosen step if there is one."""
    measured = [value for value in row["acceptance_by_position"] or [] if value is not None]
    first = f", first draft accepted {measured[0]:.0%}" if measured else ""
    best = f" ({chosen['speedup_over_ar']:.2f}x with the step chosen here)" if chosen else ""
    return (
        f"eval at step {row['step']}, temperature {row['temperature']:g}: "
        f"{row['tokens_per_forward']:.2f} tokens/forward, "
        f"{row['speedup_over_ar']:.2f}x the speed of AR{best}{first}, "
        f"held-out AR loss {row['ar_loss']:.3f} (unigram entropy {row['unigram_entropy']:.3f})"
    )
