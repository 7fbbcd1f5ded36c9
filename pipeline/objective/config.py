"""What of the loss can be chosen."""

import math
from dataclasses import dataclass, replace

AGREEMENTS = ("none", "tv", "kl", "acceptance", "blend")
TEACHERS = ("ar", "text")
PLACE_WEIGHTS = ("uniform", "decay", "dpace", "auf")


@dataclass(frozen=True)
class ObjectiveConfig:
    """The defaults are the published objective; `docs/training.md` says what the rest is for."""

    name: str = "tidar"
    """tidar trains both sections; ar has no mask section, the plain twin."""
    alpha: float = 1.0
    """Weight of the AR term against the diffusion term, 0 or more."""
    label_smoothing: float = 0.0
    """Share of each label that is spread over the vocabulary, in [0, 1)."""
    place_weights: str = "decay"
    """What a place of a block counts: uniform; decay, by position_decay; or by accepted prefix
    dpace or auf."""
    position_decay: float = 1.0
    """With decay a place p, from 0, counts this to the power of p, in (0, 1]."""
    # D-PACE's score of a draft is q(token) for `text`, as in the paper, whose text the verifier
    # wrote; for `ar` it is sum_v min(p_v, q_v), the chance of acceptance that this stands for.
    # Spec-AUF's wanted token is the text's, or the argmax of p, which greedy decoding would keep.
    teacher: str = "ar"
    """What drafts are compared with: ar, the AR distribution p of the same position; or text,
    whose token is all of p."""
    # With `text`, `kl` and `acceptance` are the cross entropy, `tv` is 1 - q(token).
    agreement: str = "none"
    """Distance between a draft's distribution q and p: none, kl (KL(p || q)), tv, acceptance
    (-log(1 - TV)) or blend (KL that becomes TV)."""
    agreement_weight: float = 0.0
    """w in (1 - w) x cross entropy + w x distance, in [0, 1]."""
    agreement_from_step: int = 0
    """Optimizer steps before the distance counts."""
    agreement_ramp_steps: int = 0
    """Optimizer steps over which w then grows."""
    alone_weight: float = 1.0
    """Weight of drafts of the head alone, of a model with a draft head; 0 or more."""
    alone_share: float = 0.25
    """Share of the blocks drafted so as well, in [0, 1]."""

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
