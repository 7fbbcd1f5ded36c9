"""What a step took of the machine: model FLOPs a second, their share of the peak, memory.

FLOPs are those that the batch needed: labelled rows of the LM head, and in attention the pairs of
query and key that the rule allows. Padding, spare mask slots and what checkpointing computes again
are not among them, so waste shows as a lower rate.
"""

import resource
import sys
from dataclasses import dataclass

import torch

from pipeline.data.order import TrainState
from pipeline.model.config import ModelConfig
from pipeline.model.flops import step_flops
from pipeline.objective.loss import MEASURED
from pipeline.planning.hardware import recognise
from pipeline.training.moments import StepMetrics
from pipeline.training.step import GlobalCounts, StepDone

MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


@dataclass(frozen=True)
class Speed:
    """Of one step, a process each."""

    model_tflops: float
    """Model TFLOP/s of one process."""
    mfu: float | None
    """Their share of the device's peak rate; None where that is not known."""
    peak_memory_bytes: int
    """On a GPU the most that torch held during the step; on a CPU the most resident memory of the
    process so far."""


class SpeedMeter:
    """Measures steps of this process; `begin` before each."""

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device,
        processes: int,
        *,
        precision: str,
        peak_tflops: float | None,
        frozen: bool = False,
    ) -> None:
        """`peak_tflops` None looks the device up by its name; `frozen` is whether the base is."""
        self.frozen = frozen
        self.config = config
        self.device = device
        self.processes = processes
        self.peak_tflops = peak_tflops
        if peak_tflops is None and device.type == "cuda":
            known = recognise(torch.cuda.get_device_name(device))
            self.peak_tflops = known.tflops(precision) if known else None

    def begin(self) -> None:
        """A step begins: what stood in memory before, such as an eval's weights, is not its own."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def measure(self, counts: GlobalCounts, seconds: float) -> Speed:
        """Of the step over the global batch of `counts`, which took `seconds`."""
        labelled = counts.ar_labels + counts.diffusion_labels + counts.alone_labels
        slots = counts.diffusion_labels + counts.unlabelled_slots
        flops = step_flops(
            self.config,
            sequences=1,
            rows=counts.clean_tokens + slots,
            pairs=counts.attention_pairs,
            labelled=labelled,
            teacher_rows=counts.teacher_rows,
            slots=slots,
            drafted=counts.diffusion_labels,
            alone=counts.alone_labels,
            frozen=self.frozen,
            measured=MEASURED,
        )
        tflops = flops.model / seconds / self.processes / 1e12
        mfu = tflops / self.peak_tflops if self.peak_tflops else None
        return Speed(tflops, mfu, self._peak_bytes())

    def _peak_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_UNIT


def step_metrics(
    done: StepDone, state: TrainState, speed: Speed, mask_norm: float | None
) -> StepMetrics:
    """The line of `metrics.jsonl` of the step after which the run is at `state`."""
    result = done.result
    return StepMetrics(
        step=done.step,
        loss=result.loss,
        loss_ar=result.loss_ar,
        loss_diffusion=result.loss_diffusion,
        loss_alone=result.loss_alone,
        learning_rate=done.learning_rate,
        grad_norm=result.grad_norm,
        tokens=state.tokens,
        tokens_per_second=done.counts.clean_tokens / done.seconds,
        sequences_seen=state.sequences_seen,
        data_digest=state.data_digest,
        step_seconds=done.seconds,
        data_wait_seconds=done.waited,
        model_tflops=speed.model_tflops,
        mfu=speed.mfu,
        peak_memory_bytes=speed.peak_memory_bytes,
        mask_embedding_norm=mask_norm,
    )
