"""The joint loss of TiDAR: next-token prediction and one-step masked diffusion, side by side.

    L = (alpha · mean CE_AR + mean CE_diffusion) / (1 + alpha)

Each mean is over that section's labelled tokens of the *global* batch, so the gradient does not
depend on how the batch was divided. Source: TiDAR (arXiv 2511.08923), section 3.1.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ObjectiveConfig:
    """`name=tidar` trains both sections; `name=ar` has no mask section, the plain twin."""

    name: str = "tidar"
    alpha: float = 1.0
    """Weight of the AR term against the diffusion term; without effect for `ar`."""

    def __post_init__(self) -> None:
        if self.name not in ("tidar", "ar"):
            raise ValueError(f"name must be tidar or ar, got {self.name!r}")
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha must be in [0, 1], got {self.alpha}")

    @property
    def drafts(self) -> bool:
        """Whether there is a mask section."""
        return self.name == "tidar"


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


def combine(objective: ObjectiveConfig, ar_mean: float, diffusion_mean: float | None) -> float:
    """The joint loss of two means, for reporting."""
    if diffusion_mean is None:
        return ar_mean
    sums = LossSums(torch.tensor(ar_mean), torch.tensor(diffusion_mean))
    return float(joint_loss(sums, objective, 1, 1))
