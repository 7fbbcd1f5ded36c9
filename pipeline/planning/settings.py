"""The config of `tidar-plan`: a training run's, checked by the same code, and the cluster's."""

from dataclasses import dataclass

from omegaconf import DictConfig, OmegaConf

from data_prep.formats.manifest import FORMAT_VERSION, Manifest, Split, TokenizerInfo
from pipeline.data.batch import section_length
from pipeline.data.place import open_data_dir
from pipeline.model.base import with_base
from pipeline.model.config import ModelConfig, block_slots
from pipeline.planning.config import ClusterConfig, PlanConfig
from pipeline.training.settings import TrainSettings
from pipeline.training.setup import drafting_config
from tidar_common.config import parse
from tidar_common.errors import UserError

KEYS = ("cluster", "plan", "check")
"""Those of a plan that are none of a run's."""


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


def train_settings(cfg: DictConfig, plan: PlanConfig) -> TrainSettings:
    """The run's settings, by the code of `tidar-train`. A plan needs neither `run_dir` nor files
    of `init_from`; without `data.dir` it is made over stand-in data."""
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
