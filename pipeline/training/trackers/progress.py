"""What the terminal shows: a live bar where there is one, a line every few seconds elsewhere."""

import time
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from pipeline.data.order import TrainState
from pipeline.model.config import ModelConfig
from pipeline.training.moments import ROUTINE, Event, StepMetrics, Tracker
from pipeline.training.settings import TrainSettings
from tidar_common.progress import doing
from tidar_common.run_files import EvalRow
from tidar_common.tables import duration

MEANINGLESS = 0.95
"""An AR loss above this share of the unigram entropy: the model knows little but how often tokens
are, and what it drafts and accepts says nothing."""
REPETITIVE = 0.3
"""A share of distinct 4-grams below which text goes round in circles, which is easy to draft."""


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
        doing.tell = self._line
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

    def on_phase(self, what: str) -> None:
        doing(what)

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
        doing.spoke()
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def on_end(self, state: TrainState, finished: bool) -> None:
        if self.bar is not None:
            self.bar.stop()


def describe_run(
    settings: TrainSettings, config: ModelConfig, processes: int, device: torch.device
) -> str:
    """Three lines at the start: what trains, on what, with what, and where it is written."""
    manifest = settings.manifest
    batch, length = settings.global_batch_size, manifest.sequence_length
    trained = config.num_drafting_parameters if settings.freeze_base else config.num_parameters
    share = "" if trained == config.num_parameters else f", {trained:,} of them trained"
    sets = settings.mix or ()
    sequences = sum(part.manifest.train.sequences for part in sets) or manifest.train.sequences
    epochs = settings.steps * batch / max(sequences, 1)
    slow = ""
    if slow_on(device, settings.precision):
        slow = ", which this CPU only emulates (precision=fp32 is several times faster)"
    plural = "es" if processes > 1 else ""
    return (
        f"{config.num_parameters:,} parameters{share}; {processes} process{plural} on "
        f"{device.type}, ZeRO {settings.deepspeed.stage}, {settings.precision}{slow}\n"
        f"{settings.steps:,} steps of {batch:,} sequences of {length:,} tokens "
        f"({batch * length:,} a step), {epochs:.3g} times the {sequences:,} sequences of the data\n"
        f"{settings.run_dir}: report.html, metrics.jsonl, events.jsonl, checkpoints; "
        f"W&B {settings.wandb.mode}"
    )


def slow_on(device: torch.device, precision: str) -> bool:
    """Whether matrix products in `precision` are emulated on `device`: those in bf16 are on x86
    before AVX-512."""
    emulated = torch.backends.cpu.get_cpu_capability() == "AVX2"
    return device.type == "cpu" and precision == "bf16" and emulated


def describe_end(settings: TrainSettings, step: int) -> str:
    """What there is now, and how to go on with it."""
    run = settings.run_dir
    lines = [
        f"done: {run} has {step} steps; open {run / 'report.html'}",
        f"decode: tidar-generate checkpoint={run} prompt=...; evaluate: tidar-evaluate "
        f"checkpoint={run}; export: tidar-export checkpoint={run} output=...",
    ]
    if settings.wandb.mode == "offline":
        lines.append(f"W&B: wandb sync {run / 'wandb'}/offline-run-*")
    return "\n".join(lines)


def describe(metrics: StepMetrics, left_s: float) -> str:
    parts = [f"loss {metrics.loss:.3f}", f"ar {metrics.loss_ar:.3f}"]
    if metrics.loss_diffusion is not None:
        parts.append(f"diffusion {metrics.loss_diffusion:.3f}")
    parts.append(f"{metrics.tokens_per_second:,.0f} tokens/s")
    parts.append(f"{duration(left_s)} left")
    return "  ".join(parts)


def describe_eval(row: EvalRow, chosen: EvalRow | None = None) -> str:
    """A line about the `tidar` row of an eval, and the row of the chosen step if there is one."""
    where = f"eval at step {row['step']}, temperature {row['temperature']:g}: "
    loss = f"held-out AR loss {row['ar_loss']:.3f} (unigram entropy {row['unigram_entropy']:.3f})"
    if row["ar_loss"] > MEANINGLESS * row["unigram_entropy"]:
        return (
            f"{where}{loss}; a model that knows hardly more than how often tokens are drafts and "
            "accepts by chance: its tokens/forward say nothing yet"
        )
    measured = [value for value in row["acceptance_by_position"] or [] if value is not None]
    first = f", first draft accepted {measured[0]:.0%}" if measured else ""
    best = f" ({chosen['speedup_over_ar']:.2f}x with the step chosen here)" if chosen else ""
    bigram = row["bigram_expected_tokens_per_forward"]
    expected = row["expected_tokens_per_forward"]
    text = ""
    if expected is not None:
        pairs = f", a table of pairs {bigram:.2f}" if bigram is not None else ""
        text = f" ({expected:.2f} expected on held-out text{pairs})"
    distinct = row["distinct_4grams"]
    loops = ""
    if distinct is not None and distinct < REPETITIVE:
        loops = f"; the text repeats itself ({distinct:.0%} distinct 4-grams), which drafts well"
    return (
        f"{where}{row['tokens_per_forward']:.2f} tokens/forward{text}, "
        f"{row['speedup_over_ar']:.2f}x the speed of AR{best}{first}, {loss}{loops}"
    )
