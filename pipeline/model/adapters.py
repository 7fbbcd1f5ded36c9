"""Low-rank updates on mask-slot rows.

An adapter adds `B (A x)` to the output of a projection `W x` (LoRA, arXiv 2106.09685, without a
scale), on the rows of mask slots alone. Clean rows, verified drafts and the cache never see one, so
the AR half of a model is, bit for bit, the model without them. Rows stand section by section, so
the product runs over a slice. `B` starts at zero: a model with new adapters is the model before.
"""

from torch import Tensor, nn

from pipeline.model.config import ModelConfig


class LowRank(nn.Module):
    """x [..., inputs] to B (A x) [..., outputs]."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


def adapter_for(config: ModelConfig, name: str, projection: nn.Linear) -> LowRank | None:
    """The adapter of the `projection` called `name`, None where the shape has none."""
    if not config.adapter_rank or name not in config.adapter_targets:
        return None
    return LowRank(projection.in_features, projection.out_features, config.adapter_rank)


def project(projection: nn.Module, adapter: LowRank | None, x: Tensor, clean: int | None) -> Tensor:
    """`projection` of all rows of `x` [B, L, inputs], with the adapter on the rows behind the first
    `clean`; None has no slots. The projection itself always runs over all rows at once, so that
    clean rows round as they do without adapters."""
    out: Tensor = projection(x)
    if adapter is None or clean is None:
        return out
    if clean == 0:
        out += adapter(x)
        return out
    out[:, clean:] += adapter(x[:, clean:])
    return out
