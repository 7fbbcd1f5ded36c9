"""The LM head and its loss, forward and backward: whole logits against a few rows at a time.

Peak memory is what it is about: every row of a micro-batch has a label, and logits have as many
columns as the vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.inputs import precision
from bench.measure import Work
from bench.results import Bench
from pipeline.objective.config import ObjectiveConfig
from pipeline.objective.head_loss import head_loss
from pipeline.objective.loss import Chains, Targets

VARIANTS = {
    "pieces": ObjectiveConfig(),
    "pieces, smoothed": ObjectiveConfig(label_smoothing=0.1),
    "pieces, tv": ObjectiveConfig(agreement="tv", agreement_weight=0.5),
    "pieces, kl": ObjectiveConfig(agreement="kl", agreement_weight=0.5),
    "pieces, blend": ObjectiveConfig(agreement="blend", agreement_weight=0.5),
    "pieces, dpace": ObjectiveConfig(place_weights="dpace", teacher="text"),
}


@dataclass(frozen=True)
class Options:
    rows: int = 2048
    """labelled rows, half of them slots: 1024 clean tokens at full coverage"""
    hidden_size: int = 64
    """width of the hidden states; of the time a small one is enough to see the memory"""
    vocab_size: int = 151936
    """columns of the logits; Qwen's by default"""
    precision: str = "fp32"
    """fp32 or bf16"""


def run(options: Options, bench: Bench) -> None:
    device, dtype = bench.device, precision(options.precision)
    generator = torch.Generator().manual_seed(0)
    half = -(-options.rows // 2)

    def leaf(rows: int) -> Tensor:
        drawn = torch.randn(rows, options.hidden_size, generator=generator)
        return drawn.to(device, dtype).requires_grad_()

    leaves = leaf(2 * half), leaf(options.vocab_size)
    labels = torch.randint(0, options.vocab_size, (2 * half,), generator=generator).to(device)
    works = {"whole logits": whole(leaves, labels, half)}
    for name, objective in VARIANTS.items():
        works[name] = in_pieces(leaves, labels, half, objective)
    samples = bench.time(works)
    bench.weigh(works)
    for name in VARIANTS:
        bench.divide(samples, name, "whole logits")
    elements = {
        "fp32 logits of all rows: MB": 2 * half * options.vocab_size,
        "gradient of the head in fp32: MB": options.vocab_size * options.hidden_size,
    }
    bench.outcome.figures.update({name: 4 * count / 1e6 for name, count in elements.items()})


def whole(leaves: tuple[Tensor, Tensor], labels: Tensor, half: int) -> Work:
    """The published objective over the logits of all rows at once."""

    def work() -> None:
        losses = F.cross_entropy((leaves[0] @ leaves[1].T).float(), labels, reduction="none")
        torch.autograd.grad((losses[:half].mean() + losses[half:].mean()) / 2, leaves)

    return work


def in_pieces(
    leaves: tuple[Tensor, Tensor], labels: Tensor, half: int, objective: ObjectiveConfig
) -> Work:
    rows = torch.arange(2 * half, device=labels.device)
    # One draft a chain: how long chains are makes no difference to the cost, either.
    chains = Chains(2 * rows[:half] + 1, rows[:half] >= 0, (half, 2))
    targets = Targets(
        rows=rows,
        labels=labels,
        ar_labels=half,
        shares=torch.full((2 * half,), 0.5 / half, device=labels.device),
        # Which row verifies a slot makes no difference to the cost.
        verifiers=rows[:half] if objective.agreement != "none" else rows[:0],
        agreement=objective.agreement,
        agreement_weight=objective.agreement_weight,
        smoothing=objective.label_smoothing,
        teacher=objective.teacher,
        place_weights=objective.place_weights,
        chains=chains if objective.by_prefix else None,
    )

    def work() -> None:
        loss, _ = head_loss(*leaves, targets)
        torch.autograd.grad(loss, leaves)

    return work
