"""The joint loss of TiDAR: next-token prediction and one-step masked diffusion, side by side.

    L = (alpha · mean CE_AR + mean CE_diffusion) / (1 + alpha)

Each mean is over that section's labelled tokens of the *global* batch, so the gradient does not
depend on how the batch was divided. Source: TiDAR (arXiv 2511.08923), section 3.1. A model with a
draft head drafts some blocks without their slots as well; their mean joins with a weight of its
own, rho:

    L = (alpha · mean CE_AR + mean CE_diffusion + rho · mean CE_alone) / (1 + alpha + rho)

`loss_sums` and `joint_loss` state the published objective on whole logits; training computes the
same, and its variants, piece by piece (`head_loss.py`).
"""

import math
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor

AGREEMENTS = ("none", "tv", "kl", "acceptance", "blend")
TEACHERS = ("ar", "text")
PLACE_WEIGHTS = ("uniform", "decay", "dpace", "auf")
MEASURED = 8
"""Of the rows of an AR loss that does not count (`alpha=0`), one in so many is measured."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """`name=tidar` trains both sections; `name=ar` has no mask section, the plain twin.

    The defaults are the published objective; `docs/training.md` says what the rest is for.
    """

    name: str = "tidar"
    alpha: float = 1.0
    """Weight of the AR term against the diffusion term, 0 or more: 3.3 counts the diffusion term
    0.3 times as much as the AR term. Without effect for `ar`."""
    label_smoothing: float = 0.0
    """Share of each label that is spread over the vocabulary."""
    place_weights: str = "decay"
    """What a place of a block counts: `uniform`; `decay` by `position_decay`; by accepted prefix
    `dpace` or `auf` (`accepted_prefix.py`), which look at the drafts first."""
    position_decay: float = 1.0
    """With `decay` a slot counts this to the power of its place in its block (0, 1, …); 1 counts
    all alike."""
    teacher: str = "ar"
    """Whom drafts are compared with, by `agreement`, `dpace` and `auf`: the AR distribution p of
    the same position, taken as given, or the token of the text.

    D-PACE's score of a draft is q(token) for `text`, as in the paper, whose text the verifier
    wrote; for `ar` it is sum_v min(p_v, q_v), the chance of acceptance that this stands for.
    Spec-AUF's wanted token is the text's, or the argmax of p, which greedy decoding would keep."""
    agreement: str = "none"
    """Distance between a draft's distribution q and its teacher's p (`distance.py`): `kl`, `tv`,
    `acceptance`, `blend`, or `none`. With `text` p is all on one token: `kl` and `acceptance` are
    the cross entropy, `tv` is 1 - q(token)."""
    agreement_weight: float = 0.0
    """w in (1 - w) · cross entropy + w · distance, for each draft that has a p; in the end."""
    agreement_from_step: int = 0
    """Optimizer steps before the distance counts at all."""
    agreement_ramp_steps: int = 0
    """Optimizer steps over which w grows from 0 to `agreement_weight`, linearly."""
    alone_weight: float = 1.0
    """rho, the weight of drafts without slots against the diffusion term; where a batch has none
    (no draft head) it counts as 0."""
    alone_share: float = 0.25
    """Share of the blocks that a model with a draft head drafts without slots as well."""

    def __post_init__(self) -> None:
        if self.name not in ("tidar", "ar"):
            raise ValueError(f"name must be tidar or ar, got {self.name!r}")
        for name, choices in (
            ("agreement", AGREEMENTS), ("teacher", TEACHERS), ("place_weights", PLACE_WEIGHTS)
        ):  # fmt: skip
            if getattr(self, name) not in choices:
                known = ", ".join(choices)
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        for name in ("alpha", "alone_weight"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("agreement_weight", "alone_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        if not 0.0 < self.position_decay <= 1.0:
            raise ValueError(f"position_decay must be in (0, 1], got {self.position_decay}")
        for name in ("agreement_from_step", "agreement_ramp_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.agreement_weight > 0 and self.agreement == "none":
            known = ", ".join(AGREEMENTS[1:])
            raise ValueError(f"agreement_weight needs agreement to be one of {known}")
        if self.position_decay != 1.0 and self.place_weights != "decay":
            raise ValueError(
                f"position_decay needs place_weights=decay, not {self.place_weights}; set it to 1"
            )

    def at(self, step: int) -> "ObjectiveConfig":
        """The objective of the step after `step` done ones: the agreement's weight as it is then,
        a pure function of the step."""
        if self.agreement_weight == 0.0:
            return self
        begun = step - self.agreement_from_step
        grown = min(1.0, begun / self.agreement_ramp_steps) if self.agreement_ramp_steps else 1.0
        weight = self.agreement_weight * grown if begun >= 0 else 0.0
        return replace(self, agreement_weight=weight)

    @property
    def drafts(self) -> bool:
        """Whether there is a mask section."""
        return self.name == "tidar"

    @property
    def compares(self) -> bool:
        """Whether a distance counts, at this step."""
        return self.agreement != "none" and self.agreement_weight > 0

    @property
    def by_prefix(self) -> bool:
        """Whether places count by accepted prefix."""
        return self.place_weights in ("dpace", "auf")

    @property
    def extra_heads(self) -> int:
        """How often the LM head runs forward for a draft beyond its own loss."""
        verifier = int(self.teacher == "ar")
        return verifier * self.compares + (1 + verifier) * self.by_prefix


@dataclass(frozen=True)
class LossSums:
    """Cross entropy summed over labelled tokens, in nats; fp32 scalars."""

    ar: Tensor
    diffusion: Tensor


def loss_sums(logits: Tensor, labels: Tensor, ar_labels: int) -> LossSums:
    """Sums over the rows `[:ar_labels]` (AR) and the rest (diffusion) of logits [N, V]."""
    losses = F.cross_entropy(logits.float(), labels, reduction="none")
    return LossSums(losses[:ar_labels].sum(), losses[ar_labels:].sum())


def joint_loss(
    sums: LossSums, objective: ObjectiveConfig, ar_labels: int, diffusion_labels: int
) -> Tensor:
    """The loss of these sums when the global batch has this many labelled tokens of each kind.

    Over all micro-batches of all ranks the results add up to the loss of the global batch.
    """
    ar = sums.ar / max(ar_labels, 1)
    if not objective.drafts:
        return ar
    diffusion = sums.diffusion / max(diffusion_labels, 1)
    return (objective.alpha * ar + diffusion) / (1.0 + objective.alpha)
