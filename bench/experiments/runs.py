"""The runs: what each differs in, where it starts, and how much it may compute.

Continual training is what was published: every run but `base` and those from scratch starts from
an AR model. `published` sets the budget; other runs get as many steps as cost the same FLOPs.
"""

from dataclasses import dataclass

from tidar_common.errors import UserError

BASE_STEPS = 1600
STEPS = 400
"""Of `published`, and of every run that sees the same clean tokens."""
HEADLINE_SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Run:
    """One training run and how it is scored."""

    name: str
    about: str
    """What it is, for a table."""
    question: str
    """The comparison it belongs to."""
    overrides: tuple[str, ...]
    start: str | None = "base"
    """The run whose weights it starts from; None draws them anew."""
    budget: str = "compute"
    """`compute`: the FLOPs of `published`; `tokens`: its steps; `total`: the FLOPs of `base` and
    `published` together; `base`: BASE_STEPS; the name of any other run: its steps."""
    headline: bool = False
    """Repeated with every seed, each from its own base."""
    score_at: tuple[int, ...] = ()
    """Block lengths to decode with; empty takes the one trained with."""


TIDAR = "objective=tidar"
EARLY = "objective.position_decay=0.8"
KL = (
    "objective=tidar_kl", "objective.agreement_from_step=0", "objective.agreement_ramp_steps=100",
)  # fmt: skip
TV = (
    "objective=tidar_tv", "objective.agreement_from_step=0", "objective.agreement_ramp_steps=100",
)  # fmt: skip

GRU = (TIDAR, "model.draft_rank=64")
"""The sequential head; its cell is a GRU unless said otherwise."""
AT_ONCE = ("objective.agreement_from_step=0", "objective.agreement_ramp_steps=100")
TEACHER = ("objective=tidar_kl", "objective.agreement_weight=1.0", *AT_ONCE, "model.draft_rank=64")
"""The AR half's distribution is all that drafts learn from."""

FAST = "optimizer.draft_learning_rate=6e-3"

RUNS = (
    Run("base", "AR model that the others start from", "start", ("objective=ar",
        "optimizer.learning_rate=3e-3"), start=None, budget="base", headline=True),
    Run("ar_tokens", "AR twin, equal clean tokens", "twin", ("objective=ar",),
        budget="tokens", headline=True),
    Run("ar_tokens_50", "AR twin, the clean tokens of `kl_early_50`", "twin", ("objective=ar",),
        budget="kl_early_50", headline=True),
    Run("ar_compute", "AR twin, equal compute", "twin", ("objective=ar",), headline=True),
    Run("published", "TiDAR as published: K = 8, full coverage, aligned grid, α = 1", "twin",
        (TIDAR,), budget="tokens", headline=True),
    Run("coverage_50", "half of the positions drafted", "coverage",
        (TIDAR, "layout.coverage=0.5")),
    Run("coverage_25", "a quarter of the positions drafted", "coverage",
        (TIDAR, "layout.coverage=0.25")),
    Run("shift", "grid shifted at random", "grid", (TIDAR, "layout.shift=true")),
    Run("tv", "acceptance-aligned loss, total variation", "agreement", TV),
    Run("kl", "acceptance-aligned loss, AR head as teacher (KL)", "agreement", KL),
    Run("alpha_03", "α = 0.3", "alpha", (TIDAR, "objective.alpha=0.3")),
    Run("early", "places of a block count 0.8 to the power of their number", "early places",
        (TIDAR, EARLY)),
    Run("kl_early", "teacher, early places", "combination", (*KL, EARLY)),
    Run("kl_early_50", "teacher, early places, half of the positions", "combination",
        (*KL, EARLY, "layout.coverage=0.5"), headline=True),
    Run("k4", "K = 4", "block length", (TIDAR, "layout.block_size=4"), headline=True),
    Run("k16", "K = 16", "block length", (TIDAR, "layout.block_size=16"), headline=True),
    Run("mixed", "K = 4, 8 and 16 in one run", "block length",
        (TIDAR, "layout.block_size=16", "layout.block_sizes=[4,8,16]"), score_at=(4, 8, 16)),
    Run("linear", "sequential head, linear cell", "head", (*GRU, "model.draft_cell=linear")),
    Run("mlp", "sequential head, two layers", "head", (*GRU, "model.draft_cell=mlp")),
    Run("gru", "sequential head, GRU", "head", GRU, headline=True),
    Run("gru_r16", "the same, rank 16", "head", (*GRU, "model.draft_rank=16")),
    Run("gru_r128", "the same, rank 128", "head", (*GRU, "model.draft_rank=128")),
    Run("gru_kl", "GRU, AR head as teacher", "draft loss", TEACHER, headline=True),
    Run("gru_kl_fast", "the same, the head's learning rate three times the base's", "draft rate",
        (*TEACHER, FAST), headline=True),
    Run("gru_kl_fast_early", "the same, early places", "draft rate", (*TEACHER, FAST, EARLY)),
    Run("gru_tv", "GRU, total variation", "draft loss",
        (*TEACHER, "objective.agreement=tv", "objective.agreement_weight=0.5")),
    Run("gru_lk", "GRU, −log of the acceptance", "draft loss",
        (*TEACHER, "objective.agreement=acceptance")),
    Run("gru_blend", "GRU, λ·KL + (1 − λ)·TV", "draft loss",
        (*TEACHER, "objective.agreement=blend")),
    Run("gru_dpace", "GRU, D-PACE weights", "draft loss",
        (*GRU, "objective.place_weights=dpace", "objective.teacher=text")),
    Run("gru_auf", "GRU, cut at the first predicted failure", "draft loss",
        (*GRU, "objective.place_weights=auf", "objective.teacher=text")),
    Run("gru_alpha_03", "GRU, α = 0.3", "alpha", (*GRU, "objective.alpha=0.3")),
    Run("gru_alpha_33", "GRU, α = 3.3", "alpha", (*GRU, "objective.alpha=3.3")),
    Run("gru_50", "GRU, half of the positions drafted", "coverage",
        (*GRU, "layout.coverage=0.5")),
    Run("gru_causal", "GRU, causal slots", "slots", (*GRU, "layout.causal_slots=true")),
    Run("gru_adapters", "GRU, adapters of rank 16 on slots", "adapters",
        (*GRU, "adapter.rank=16")),
    Run("gru_frozen", "GRU and adapters of rank 16, base frozen", "adapters",
        (*TEACHER, "freeze_base=true", "adapter.rank=16")),
    Run("head_frozen", "GRU fitted to `published`, all else frozen", "head",
        (*TEACHER, "freeze_base=true"), start="published", budget="tokens"),
    Run("gru_linear", "GRU, one stale block for all counts", "slots",
        (*TEACHER, "layout.linear=true")),
    Run("gru_kl_fast_k4", "GRU, AR head as teacher, fast, K = 4", "block length",
        (*TEACHER, FAST, "layout.block_size=4"), headline=True),
    Run("gru_kl_fast_k16", "GRU, AR head as teacher, fast, K = 16", "block length",
        (*TEACHER, FAST, "layout.block_size=16"), headline=True),
    Run("scratch", "TiDAR as published, from scratch", "start",
        (TIDAR, "optimizer.learning_rate=3e-3"), start=None, budget="total"),
    Run("ar_scratch", "AR twin in one run from scratch", "start",
        ("objective=ar", "optimizer.learning_rate=3e-3"), start=None, budget="total"),
)  # fmt: skip
PUBLISHED_AT = {4: "k4", 8: "published", 16: "k16"}
"""The published objective at each block length."""
BEST_AT = {4: "gru_kl_fast_k4", 8: "gru_kl_fast", 16: "gru_kl_fast_k16"}
"""The recipe that gives most expected tokens per forward at equal compute."""
TWINS = {"ar_tokens": "equal clean tokens", "ar_compute": "equal compute"}
"""AR runs that quality is compared with, and on what terms."""
BY_NAME = {run.name: run for run in RUNS}


def find_run(name: str) -> Run:
    if name not in BY_NAME:
        raise UserError(f"--only: no run named {name!r}; known are {', '.join(BY_NAME)}")
    return BY_NAME[name]
