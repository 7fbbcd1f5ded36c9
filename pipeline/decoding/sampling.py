"""From logits to tokens, with random streams that are independent of each other."""

from dataclasses import dataclass

import torch
from torch import Tensor

from data_prep.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    `temperature` 0 is greedy. `trust` is the weight β of the autoregressive logits in the
    verifier's target, β · AR + (1 - β) · diffusion: 1 ("trust AR") is lossless, below 1 is not.
    """

    temperature: float = 0.0
    trust: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(f"temperature: must be 0 (greedy) or above, got {self.temperature}")
        if not 0.0 <= self.trust <= 1.0:
            raise UserError(f"trust: must be in [0, 1], got {self.trust}")

    def generator(self, stream: int, device: torch.device) -> torch.Generator:
        """A generator for one purpose (0 verifies, 1 drafts), unrelated to the others."""
        state = torch.Generator().manual_seed(self.seed)
        seeds = torch.randint(2**62, (stream + 1,), generator=state)
        return torch.Generator(device).manual_seed(int(seeds[stream]))

    def probabilities(self, logits: Tensor) -> Tensor:
        """The distribution that tokens are drawn from, fp32 [..., V]; one-hot when greedy."""
        if self.temperature == 0:
            best = logits.argmax(-1, keepdim=True)
            return torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, best, 1.0)
        return torch.softmax(logits.float() / self.temperature, dim=-1)


def draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """One token for each row of `probabilities` [N, V]; int64 [N]."""
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)
