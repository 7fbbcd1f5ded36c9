"""How well a draft's confidence says what becomes of it: drafts counted by confidence.

Confidence is the probability that a mask slot gives its likeliest token. Source of the measure:
Guo et al., On Calibration of Modern Neural Networks (arXiv 1706.04599).
"""

from typing import Any

import torch
from torch import Tensor

BINS = 10
"""Equal parts of [0, 1]."""
ROWS = ("drafts", "confidence", "right", "verified")
"""Summed up in each bin: how many drafts, their confidence, how many have the text's token as the
likeliest, and how many the verifier's."""


def empty_bins() -> Tensor:
    """Sums of no drafts, fp64 [4, BINS]; sums of several parts add up."""
    return torch.zeros(len(ROWS), BINS, dtype=torch.float64)


def binned(confidence: Tensor, right: Tensor, verified: Tensor) -> Tensor:
    """`ROWS` by bin, fp64 [4, BINS], of drafts with these values, fp64 [N] each."""
    number = (confidence * BINS).long().clamp(max=BINS - 1)
    values = torch.stack([torch.ones_like(confidence), confidence, right, verified])
    return empty_bins().index_add_(1, number, values)


def describe(bins: Tensor) -> dict[str, Any]:
    """Shares by bin, None where a bin has no draft, and the expected calibration error; the keys
    of `docs/evals.md`. None for no drafts at all."""
    drafts, confidence, right, _ = bins
    total = float(drafts.sum())
    if not total:
        return {"draft_calibration": None, "draft_calibration_error": None}
    counts = [int(count) for count in drafts.tolist()]
    shares = {
        name: [s / n if n else None for s, n in zip(sums.tolist(), counts, strict=True)]
        for name, sums in zip(ROWS[1:], bins[1:], strict=True)
    }
    error = float((confidence - right).abs().sum()) / total
    return {
        "draft_calibration": {"drafts": counts, **shares},
        "draft_calibration_error": error,
    }
