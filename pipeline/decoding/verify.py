"""Rejection sampling: keep drafts so that the output is distributed as the target says.

Leviathan et al., *Fast Inference from Transformers via Speculative Decoding* (2023), with p the
target (verifier) and q the draft distribution; TiDAR (arXiv 2511.08923), section 3.2.
"""

import torch
from torch import Tensor

from pipeline.decoding.sampling import draw


def verify(
    drafts: Tensor, draft_probabilities: Tensor, target: Tensor, generator: torch.Generator
) -> tuple[int, int]:
    """Accept drafts from the left, then draw the token after the last accepted one.

    Draft i is accepted with probability min(1, p_i / q_i); at the first rejection the token comes
    from the normalised positive part of p - q, after the last draft from p itself. With one-hot
    rows this is greedy decoding: accept while the draft is the target's argmax.

    Args:
        drafts: token ids, int64 [N].
        draft_probabilities: q, the distributions the drafts were drawn from, [N, V].
        target: p for the same N positions and the one after them, [N + 1, V].
        generator: source of the verifier's randomness.

    Returns:
        The number of accepted drafts, 0 … N, and the token drawn after them.
    """
    count = len(drafts)
    accepted = 0
    if count:
        column = drafts[:, None]
        p = target[:count].gather(1, column).squeeze(1)
        q = draft_probabilities.gather(1, column).squeeze(1)
        uniform = torch.rand(count, generator=generator, device=drafts.device)
        # u < p / q without the division; a draft has q > 0, or it would not have been drawn.
        accepted = int((uniform * q < p).int().cumprod(0).sum())
    remaining = target[accepted]
    if accepted < count:
        remaining = (remaining - draft_probabilities[accepted]).clamp_min(0.0)
        if not bool(remaining.any()):
            # p and q agree to the last bit: p is all that is left to draw from.
            remaining = target[accepted]
    return accepted, int(draw(remaining[None], generator))
