"""The config of `tidar-plan`: a training run's, checked by the same code, and the cluster's."""

from dataclasses import dataclass

from omegaconf import DictConfig, OmegaConf

from data_prep.formats.manifest import FORMAT_VERSION, Manifest, Split, TokenizerInfo
from pipeline.data.batch import section_length
from pipeline.data.place import open_data_dir
from pipeline.model.base import with_base
from pipeline.model.config import ModelConfig, block_slots
from pipeline.training.settings import TrainSettings, with_layout
from tidar_common.config import parse
from tidar_common.errors import UserError

ATTENTION = ("flex", "fused", "math")


@dataclass(frozen=True)
class ClusterConfig:
    """Where the run would go; see `conf/plan.yaml`."""

    nodes: int = 1
    gpus_per_node: int = 8
    gpu: str | None = None
    memory_gib: float | None = None
    tflops: float | None = None

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
    """What a plan assumes; see `conf/plan.yaml`."""

    sequence_length: int | None = None
    vocab_size: int | None = None
    mfu: float = 0.4
    attention: str = "flex"
    reserve_gib: float = 4.0
    json: str | None = None

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
class Planned:
    """Everything a plan is made from."""

    train: TrainSettings
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
        cluster = parse(ClusterConfig, cfg.cluster, "cluster")
        plan = parse(PlanConfig, cfg.plan, "plan")
        train = train_settings(cfg, plan)
        manifest = train.manifest
        length = manifest.sequence_length
        block_size = train.layout.block_size or manifest.block_size
        coverage = train.layout.coverage or manifest.coverage
        tokenizer = manifest.tokenizer
        model = train.model.with_tokens(tokenizer.vocab_size, tokenizer.mask_id, block_size)
        if train.objective.drafts:
            model = with_layout(model, train.layout)
        if length > model.max_positions:
            raise UserError(
                f"model.max_positions: {model.max_positions}, but the sequences have {length} "
                "tokens; raise it or prepare shorter sequences"
            )
        most = block_slots(block_size, model.linear_drafts)
        slots = section_length(length, coverage, most) if train.objective.drafts else 0
        return cls(train, cluster, plan, model, length, slots, coverage, block_size)


def train_settings(cfg: DictConfig, plan: PlanConfig) -> TrainSettings:
    """The run's settings, by the checks of `tidar-train`; without `data.dir` over stand-in data."""
    own = OmegaConf.masked_copy(cfg, [str(k) for k in cfg if k not in ("cluster", "plan")])
    if own.run_dir is None:
        own.run_dir = "not given"
    if own.data.dir is not None:
        for name in ("sequence_length", "vocab_size"):
            if getattr(plan, name) is not None:
                raise UserError(f"plan.{name}: is the data's own; leave out it or data.dir")
        return TrainSettings.from_config(own, Manifest.load(open_data_dir(own)))
    return TrainSettings.from_config(own, stand_in_manifest(own, plan))


def stand_in_manifest(cfg: DictConfig, plan: PlanConfig) -> Manifest:
    """A manifest of no data at all, with the lengths that were given on the command line."""
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
