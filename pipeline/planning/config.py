"""What `tidar-plan` takes beside the keys of a run: the cluster, and what a plan assumes."""

from dataclasses import dataclass

from pipeline.training.config import TRAIN, RunKeys
from tidar_common.schema import Command, register

ATTENTION = ("flex", "fused", "math")


@dataclass(frozen=True)
class ClusterConfig:
    """Where the run would go."""

    nodes: int = 1
    """Machines."""
    gpus_per_node: int = 8
    """Processes of each, one for each GPU."""
    gpu: str | None = None
    """a100_40gb, a100_80gb, h100_80gb, h200, b200, or cpu, whose processes share the memory free on
    this host; another name is unknown. None is unknown to a plan, and to a check this machine."""
    memory_gib: float | None = None
    """Memory in GiB of a GPU that is not in the list, as nvidia-smi shows it; of a process on a
    CPU."""
    tflops: float | None = None
    """Of a GPU that is not in the list: peak dense TFLOP/s in the run's precision."""

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("memory_gib", "tflops"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be above 0, got {value}")

    @property
    def processes(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class PlanConfig:
    """What a plan assumes."""

    sequence_length: int | None = None
    """Tokens of a packed sequence; a plan takes it, and vocab_size, instead of data.dir."""
    vocab_size: int | None = None
    """Ids of the tokenizer, where the model has no vocabulary of its own."""
    mfu: float = 0.4
    """Assumed share of the peak TFLOP/s that the step's FLOPs reach, in (0, 1]."""
    attention: str = "flex"
    """flex (as training on a GPU: neither mask nor scores in memory), fused (a dense mask) or math
    (a dense mask, and scores)."""
    reserve_gib: float = 4.0
    """GiB of a GPU left to CUDA, NCCL and fragmentation."""
    json: str | None = None
    """Also write the plan to this JSON file."""

    def __post_init__(self) -> None:
        if not 0.0 < self.mfu <= 1.0:
            raise ValueError(f"mfu must be in (0, 1], got {self.mfu}")
        if self.attention not in ATTENTION:
            raise ValueError(f"attention must be flex, fused or math, got {self.attention!r}")
        for name in ("sequence_length", "vocab_size"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise ValueError(f"{name} must be at least 2, got {value}")
        if self.reserve_gib < 0:
            raise ValueError(f"reserve_gib must be 0 or more, got {self.reserve_gib}")


@dataclass(frozen=True)
class PlanKeys(RunKeys):
    """Those of a run, of which a plan needs next to none, and what it asks."""

    check: bool = False
    """Ask whether the run could start, by the code of tidar-train: its keys, data, weights, batch,
    memory, run directory, disk space and W&B."""


ABOUT = """\
tidar-plan: what a training run takes (memory, FLOPs, days, disk) before it is started, and with
check=true whether it could start.

  tidar-plan experiment=tidar_1p5b plan.sequence_length=4096 cluster.gpu=h100_80gb
  tidar-plan experiment=tidar_8b data.dir=data/mine cluster.nodes=4 cluster.gpu=h200
  tidar-plan ... deepspeed=zero3 micro_batch_size=1 plan.json=plan.json
  tidar-plan ... data.dir=data/mine run_dir=runs/first check=true
  slurm/submit.sh --nodes=4 --gpus-per-node=8 experiment=... data.dir=... run_dir=...
                                            checks, and submits what passes

Needs no GPU, starts no processes and writes nothing but plan.json. Exit codes: 0 the run can start,
2 it cannot.
"""
SECTIONS = {**TRAIN.sections, "cluster": ClusterConfig, "plan": PlanConfig}
register(Command("plan", ABOUT, PlanKeys, SECTIONS, TRAIN.groups, {"precision": None}))
