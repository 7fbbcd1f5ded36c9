"""Where greedy TiDAR and greedy AR part, and how near a tie that was.

In exact arithmetic they never part. The two compute the same logits in matrices of other shapes, so
rounding can turn a near tie, above all in bf16; the gap between the two tokens' logits shows
whether it was one.
"""

from collections.abc import Sequence

import torch

from pipeline.model.transformer import Transformer


@torch.inference_mode()
def divergence_gap(
    model: Transformer, prompt: Sequence[int], ar: Sequence[int], other: Sequence[int]
) -> float | None:
    """The logit of AR's token less that of the other's where the two texts first differ.

    From one plain causal forward over the text that they share. None when they are equal, or when
    one is the other's beginning.
    """
    pairs = zip(ar, other, strict=False)
    place = next((n for n, (left, right) in enumerate(pairs) if left != right), None)
    if place is None:
        return None
    text = [*prompt, *ar[:place]]
    device = next(model.parameters()).device
    hidden = model.hidden(torch.tensor([text], device=device))[0, -1]
    logits = model.lm_head(hidden).float()
    return float(logits[ar[place]] - logits[other[place]])
