"""What `tidar-train` takes: every key of a run, and the sections whose code needs torch.

Free of torch, so that help and a mistake in a key come at once. Sections of other rooms stand with
their code. `settings.py` makes a run's settings of them.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.checkpoint.retention import CheckpointConfig
from pipeline.data.place import DataConfig
from pipeline.data.source import LayoutChoice
from pipeline.evals.config import DecodeSpeedConfig
from pipeline.model.config import BACKENDS, CHECKPOINTING, AdapterConfig, ModelKeys
from pipeline.objective.config import ObjectiveConfig
from pipeline.training.launch.signals import deadline
from tidar_common.errors import UserError
from tidar_common.schema import NO_VALUE, Command, register

PRECISIONS = ("bf16", "fp32")
AUTO = ("auto", "true", "false")
FEWEST = 16
"""Values before a spike's score means anything."""
REPORT, SKIP, ROLLBACK = "report", "skip", "rollback"
MODES = ("offline", "online", "disabled")


@dataclass(frozen=True)
class RunKeys:
    """The keys of a run that stand in no section."""

    run_dir: Path
    """Folder of the run; the same command continues it."""
    steps: int = 1000
    """Optimizer steps."""
    seed: int = 0
    """Of weights, data order and block shifts."""
    init_from: Path | None = None
    """Start from a Hugging Face folder, its id on the hub (owner/name), a .gguf file, an export or
    a checkpoint, which also gives the shape; None draws weights anew, of model=small (or tiny)."""
    freeze_base: bool = False
    """Train only what drafts (adapters, draft head, the slots' embedding); the AR half stays that
    of init_from, bit for bit."""
    global_batch_size: int = 32
    """Sequences in an optimizer step, over all processes."""
    micro_batch_size: int = 4
    """Sequences in one forward of one process."""
    precision: str = "bf16"
    """bf16 or fp32; None takes that of the weights at init_from, and bf16 without."""
    activation_checkpointing: str = "none"
    """What the backward pass computes again: none, selective (feed-forward activations, a third
    less memory) or full (whole layers, a third more time)."""
    compile: str = "auto"
    """torch.compile each layer: true, false, or auto, which does on a GPU where the compiler works;
    not with deepspeed=zero3."""
    attention: str = "auto"
    """auto (flex on a GPU, tiles on a CPU), flex, tiles, or dense, to compare with."""
    peak_tflops: float | None = None
    """Peak dense TFLOP/s of a device, for mfu; None looks a known GPU up."""
    deterministic: bool = False
    """Bit-equal losses between two runs on one topology."""
    preflight: str = "auto"
    """Check all hosts before the first step: true, false, or auto, on more than one node."""
    stop_before: str | None = "auto"
    """Save and leave before this: auto (the Slurm job's time limit), None, 90m, 1d12h, or
    2026-01-31T18:00."""
    stop_margin_s: float = 120
    """Seconds before it for the last step and its save."""
    tensorboard: bool = False
    """Also write run_dir/tensorboard; needs that extra."""
    log_every_s: float = 10
    """Seconds between progress lines without a terminal."""

    def __post_init__(self) -> None:
        for key, known in (("preflight", AUTO), ("compile", AUTO), ("precision", PRECISIONS),
                           ("activation_checkpointing", CHECKPOINTING),
                           ("attention", BACKENDS)):  # fmt: skip
            if (value := getattr(self, key)) not in known:
                shown = ", ".join(known)
                raise UserError(f"{key}: unknown value {value!r}; known are {shown}")
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise UserError(f"peak_tflops: must be above 0, got {self.peak_tflops}")
        for key, least in (("steps", 1), ("seed", 0), ("global_batch_size", 1),
                           ("micro_batch_size", 1)):  # fmt: skip
            if (number := getattr(self, key)) < least:
                raise UserError(f"{key}: must be at least {least}, got {number}")
        for key in ("stop_margin_s", "log_every_s"):
            if (seconds := getattr(self, key)) < 0:
                raise UserError(f"{key}: must be 0 or more, got {seconds}")
        deadline(self.stop_before, self.stop_margin_s)  # a mistake in it shows now


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW."""

    learning_rate: float = 3e-4
    """Peak of the schedule, above 0."""
    draft_learning_rate: float | None = None
    """The same for what only drafts; None takes learning_rate."""
    beta1: float = 0.9
    """Decay of the mean of gradients, in [0, 1)."""
    beta2: float = 0.95
    """Decay of the mean of their squares, in [0, 1)."""
    epsilon: float = 1e-8
    """Added to the root of that mean, above 0."""
    weight_decay: float = 0.1
    """Of matrices but those that only draft."""
    gradient_clipping: float = 1.0
    """Largest gradient norm of a step; 0 does not clip."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "draft_learning_rate", "epsilon"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        for name in ("weight_decay", "gradient_clipping"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")

    @property
    def draft_rate_scale(self) -> float:
        """The rate of weights that only draft, in rates of the others."""
        return (self.draft_learning_rate or self.learning_rate) / self.learning_rate


@dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up, then half a cosine down to a share of the peak."""

    warmup_steps: int = 100
    """Optimizer steps of linear warm-up."""
    final_share: float = 0.1
    """Learning rate of the last step as a share of the peak."""

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be 0 or more, got {self.warmup_steps}")
        if not 0.0 <= self.final_share <= 1.0:
            raise ValueError(f"final_share must be in [0, 1], got {self.final_share}")


@dataclass(frozen=True)
class DeepSpeedConfig:
    """What is partitioned over the processes, and what lives on the host."""

    stage: int = 1
    """ZeRO: 0 partitions nothing, 1 optimizer states, 2 and gradients, 3 and parameters."""
    offload_optimizer: bool = False
    """Optimizer states in host memory (stages 1 to 3)."""
    offload_parameters: bool = False
    """Weights in host memory (stage 3)."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further DeepSpeed settings, merged over ours."""

    def __post_init__(self) -> None:
        if self.stage not in (0, 1, 2, 3):
            raise ValueError(f"stage must be 0, 1, 2 or 3, got {self.stage}")
        if self.offload_optimizer and self.stage == 0:
            raise ValueError("offload_optimizer needs stage 1, 2 or 3")
        if self.offload_parameters and self.stage != 3:
            raise ValueError("offload_parameters needs stage 3")


@dataclass(frozen=True)
class AnomalyConfig:
    max_skipped_in_a_row: int = 5
    """Skipped steps in a row; one more ends the run."""
    spike_score: float = 0.0
    """A loss or gradient norm with a robust z-score above this is a spike; 0 finds none."""
    spike_window: int = 128
    """Steps that a score looks back on."""
    on_spike: str = REPORT
    """report, skip the step, or rollback to the last checkpoint and go on without its sequences."""
    max_rollbacks: int = 3
    """Rollbacks to one checkpoint; one more ends the run."""

    def __post_init__(self) -> None:
        if self.max_skipped_in_a_row < 0:
            raise ValueError(
                f"max_skipped_in_a_row must be 0 or more, got {self.max_skipped_in_a_row}"
            )
        if self.spike_score < 0:
            raise ValueError(f"spike_score must be 0 or more, got {self.spike_score}")
        if self.spike_window < FEWEST:
            raise ValueError(f"spike_window must be at least {FEWEST}, got {self.spike_window}")
        if self.on_spike not in (REPORT, SKIP, ROLLBACK):
            known = f"{REPORT}, {SKIP} or {ROLLBACK}"
            raise ValueError(f"on_spike must be {known}, got {self.on_spike!r}")
        if self.on_spike != REPORT and not self.spike_score:
            raise ValueError(f"on_spike={self.on_spike} needs a spike_score above 0, such as 10")
        if self.max_rollbacks < 0:
            raise ValueError(f"max_rollbacks must be 0 or more, got {self.max_rollbacks}")


@dataclass(frozen=True)
class WatchConfig:
    hang_timeout_s: float = 1800
    """Seconds at one step, save or eval after which the job ends; 0 never."""
    data_stall_s: float = 60
    """Seconds of waiting for data that are reported; 0 never."""
    straggler_ratio: float = 1.5
    """Report a rank whose forwards take this many times the median; 0 never."""
    report_every: int = 50
    """Steps between these comparisons of ranks."""

    def __post_init__(self) -> None:
        for key in ("hang_timeout_s", "data_stall_s", "straggler_ratio"):
            if (value := getattr(self, key)) < 0:
                raise ValueError(f"{key} must be 0 or more, got {value}")
        if self.report_every < 1:
            raise ValueError(f"report_every must be at least 1, got {self.report_every}")


@dataclass(frozen=True)
class ArGuardConfig:
    most_rise: float = 0.05
    """Nats a token that the held-out AR loss may rise above that of init_from."""

    def __post_init__(self) -> None:
        if self.most_rise < 0:
            raise ValueError(f"most_rise must be 0 or more, got {self.most_rise}")


@dataclass(frozen=True)
class MaskGuardConfig:
    least_share: float = 1e-3
    """Report a mask embedding with a norm below this share of the text's mean."""
    most_share: float = 10.0
    """Or above this."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.least_share < self.most_share:
            raise ValueError(
                f"least_share must be 0 or more and below most_share, got {self.least_share} and "
                f"{self.most_share}"
            )


@dataclass(frozen=True)
class WandbConfig:
    mode: str = "offline"
    """online, disabled, or offline: to run_dir/wandb, for `wandb sync` to upload later."""
    project: str = "tidar"
    """Project the run belongs to."""
    entity: str | None = None
    """Team or user; None takes your default."""
    name: str | None = None
    """Name of the run; None takes the run directory's."""
    tags: tuple[str, ...] = ()
    """For example [ablation,k16]."""
    alerts: bool = True
    """Send an alert when something goes wrong."""
    checkpoints: bool = False
    """Record checkpoints as artifacts that refer to their folders."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")


ABOUT = """\
tidar-train: train a TiDAR model, or its autoregressive twin, on prepared data.

  tidar-train data.dir=data/mine run_dir=runs/first model=tiny steps=500 precision=fp32
  torchrun --nproc-per-node 8 -m pipeline.train experiment=tidar_1p5b data.dir=... run_dir=...
  tidar-train ... objective=ar              the plain twin, for comparison
  tidar-train -m ... objective.alpha=0.3,1  several runs, one after the other, below run_dir
  tidar-train ... deepspeed=zero3           partition parameters as well

The same command continues an interrupted run. Exit codes: 0 done, 2 bad config or input,
3 cannot go on (not finite, disk full), 4 a process hung or was lost, 75 stopped by a signal and
saved (0 under torchrun; either way run_dir has the file `interrupted` until the run is continued).
"""
SECTIONS: dict[str, type] = {
    "data": DataConfig,
    "model": ModelKeys,
    "layout": LayoutChoice,
    "objective": ObjectiveConfig,
    "adapter": AdapterConfig,
    "optimizer": OptimizerConfig,
    "schedule": ScheduleConfig,
    "deepspeed": DeepSpeedConfig,
    "checkpoint": CheckpointConfig,
    "evals.decode_speed": DecodeSpeedConfig,
    "anomalies": AnomalyConfig,
    "watch": WatchConfig,
    "ar_guard": ArGuardConfig,
    "mask_guard": MaskGuardConfig,
    "wandb": WandbConfig,
}
GROUPS = {
    "model": "auto", "objective": "tidar", "curriculum": "none", "deepspeed": "zero1",
    "experiment": None,
}  # fmt: skip
TRAIN = Command(
    "train", ABOUT, RunKeys, SECTIONS, GROUPS, {"data.dir": NO_VALUE, "precision": None}
)
register(TRAIN)
