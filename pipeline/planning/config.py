"""What `tidar-plan` takes: the keys of a training run, checked by the same code, the cluster's, and
what a plan assumes. Free of torch until a run is checked, so that help comes at once.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from data_prep.formats.manifest import FORMAT_VERSION, Manifest, Split, TokenizerInfo
from pipeline.model.config import ModelConfig, block_slots
from pipeline.training.config import TRAIN, RunKeys
from tidar_common.config import parse
from tidar_common.errors import UserError
from tidar_common.schema import Command, register

if TYPE_CHECKING:
    from pipeline.training.settings import TrainSettings

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


KEYS = ("cluster", "plan", "check")
"""Those of a plan that are none of a run's."""


@dataclass(frozen=True)
class Planned:
    """Everything a plan is made from."""

    train: "TrainSettings"
    cluster: ClusterConfig
    plan: PlanConfig
    model: ModelConfig
    """With the data's vocabulary."""
    sequence_length: int
    """S, clean tokens of a sequence."""
    num_slots: int
    """M, mask slots of a sequence."""
    coverage: float
    block_size: int
    check: bool
    """Whether the run could start is asked, not what it takes."""

    @property
    def block_slots(self) -> int:
        """Slots of a whole block."""
        return block_slots(self.block_size, self.model.linear_drafts)

    @property
    def rows(self) -> int:
        """Rows of a sequence in the joint forward, S + M."""
        return self.sequence_length + self.num_slots

    @classmethod
    def from_config(cls, cfg: DictConfig) -> "Planned":
        """Check `cfg`; raises UserError naming the first key that is wrong and the remedy."""
        from pipeline.data.batch import section_length
        from pipeline.training.setup import drafting_config

        cluster = parse(ClusterConfig, cfg.cluster, "cluster")
        plan = parse(PlanConfig, cfg.plan, "plan")
        if not isinstance(cfg.check, bool):
            raise UserError(f"check: must be true or false, got {cfg.check!r}")
        train = train_settings(cfg, plan)
        manifest = train.manifest
        length = manifest.sequence_length
        block_size = train.layout.block_size or manifest.block_size
        coverage = train.layout.coverage or manifest.coverage
        model = drafting_config(train)
        most = block_slots(block_size, model.linear_drafts)
        slots = section_length(length, coverage, most) if train.objective.drafts else 0
        return cls(train, cluster, plan, model, length, slots, coverage, block_size, cfg.check)


def train_settings(cfg: DictConfig, plan: PlanConfig) -> "TrainSettings":
    """The run's settings, by the code of `tidar-train`. A plan needs neither `run_dir` nor files
    of `init_from`; without `data.dir` it is made over stand-in data."""
    from pipeline.data.place import open_data_dir
    from pipeline.training.settings import TrainSettings

    run = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in KEYS])
    has_data = OmegaConf.select(run, "data.dir", throw_on_missing=False) is not None
    for name in ("sequence_length", "vocab_size") if has_data else ():
        if getattr(plan, name) is not None:
            raise UserError(f"plan.{name}: is the data's own; leave out it or data.dir")
    if cfg.check:
        return TrainSettings.from_config(run, starts=False)
    if OmegaConf.select(run, "run_dir", throw_on_missing=False) is None:
        run.run_dir = "not given"
    if has_data:
        manifest = Manifest.load(open_data_dir(run))
        return TrainSettings.from_config(run, manifest, starts=False)
    run.data.dir = None
    return TrainSettings.from_config(run, stand_in_manifest(run, plan), starts=False)


def stand_in_manifest(cfg: DictConfig, plan: PlanConfig) -> Manifest:
    """A manifest of no data at all, with the lengths that were given on the command line."""
    from pipeline.model.base import with_base

    if plan.sequence_length is None:
        raise UserError(
            "plan.sequence_length: has no value; set it, or data.dir=... to plan for prepared data"
        )
    based = with_base(cfg, needed=False)
    vocab_size = plan.vocab_size or based.rows or based.cfg.model.get("vocab_size")
    if vocab_size is None:
        raise UserError(
            "plan.vocab_size: has no value and the model has no vocabulary of its own; set it, "
            "or data.dir=... to plan for prepared data"
        )
    if cfg.objective.get("name") != "ar" and cfg.layout.get("block_size") is None:
        raise UserError("layout.block_size: has no value; set it, or data.dir=...")
    nothing = Split((), 0, 0, 0, 0, 0, 0, 0)
    return Manifest(
        format_version=FORMAT_VERSION,
        config={},
        config_hash="",
        sequence_length=plan.sequence_length,
        group_size=1,
        block_size=cfg.layout.get("block_size") or 1,
        coverage=1.0,
        shift=False,
        tokenizer=TokenizerInfo("none", "none", "", int(vocab_size), 0, 0, 0, 0),
        token_counts_sha256="",
        train=nothing,
        heldout=nothing,
        documents={},
    )
