"""Attention over a part of the keys, with what it takes to merge the parts.

A row's softmax over all keys is the mean of its softmaxes over the parts, each weighted by the
part's share of the sum of exponentials, whose logarithm (the log-sum-exp) every part returns. The
gradients of a part need the merged output and the merged log-sum-exp, and nothing of the other
parts. Sources: FlashAttention (arXiv 2205.14135), section 3.1; Ring Attention (arXiv 2310.01889).
Letters: B batch, H heads, Q queries, K keys, D head size.
"""

import math

import torch
from torch import Tensor

_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
"""What `scaled_dot_product_attention` calls on a CPU; only the first of its results comes out of
there."""


def attend_part(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention of some queries over a part of their keys.

    Args:
        query: [B, H, Q, D].
        key: [B, H, K, D].
        value: [B, H, K, D].
        bias: added to the scores, fp32, broadcasting to [B, H, Q, K]: 0, or -inf where a row may
            not attend. None is causal, of as many queries as keys.

    Returns:
        The output [B, H, Q, D] and the log-sum-exp of the scores, [B, H, Q] in fp32 (fp64 of fp64).
        A row that sees no key has the output 0; its log-sum-exp is any number.
    """
    if query.device.type == "cpu":
        return _FUSED(query, key, value, 0.0, bias is None, attn_mask=_fitting(bias, query))
    return attend_plainly(query, key, value, _causal(query) if bias is None else bias)


def part_gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `query`, `key` and `value` through this part, by `grad` of the merged `output`
    whose log-sum-exp is `lse`; other arguments as in `attend_part`."""
    if query.device.type == "cpu":
        return _FUSED_BACKWARD(
            grad, query, key, value, output, lse, 0.0, bias is None,
            attn_mask=_fitting(bias, query),
        )  # fmt: skip
    bias = _causal(query) if bias is None else bias
    return plain_gradients(grad, query, key, value, output, lse, bias)


def attend_plainly(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """`attend_part` by matrix products: on any device, and faster where there are few keys."""
    scores = _scores(query, key, bias)
    lse = scores.logsumexp(-1)
    weights = _weights(scores, lse).to(value.dtype)
    return weights @ value, lse


def plain_gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor,
    bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`part_gradients` by matrix products."""
    weights = _weights(_scores(query, key, bias), lse)
    along = (grad.to(lse.dtype) * output).sum(-1, keepdim=True)
    scores_grad = (weights * (grad @ value.mT - along) / math.sqrt(query.shape[-1])).to(key.dtype)
    return scores_grad @ key, scores_grad.mT @ query, weights.to(grad.dtype).mT @ grad


def _scores(query: Tensor, key: Tensor, bias: Tensor) -> Tensor:
    scores = (query / math.sqrt(query.shape[-1])) @ key.mT
    return scores.to(torch.promote_types(scores.dtype, torch.float32)) + bias


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    # Of a row without keys both are -inf, whose difference is no number.
    return (scores - lse.clamp_min(torch.finfo(lse.dtype).min)[..., None]).exp_()


def _fitting(bias: Tensor | None, query: Tensor) -> Tensor | None:
    """The bias in the type that the fused kernel reads it in, without a look: fp64 of fp64."""
    return bias if bias is None else bias.to(torch.promote_types(query.dtype, torch.float32))


def _causal(query: Tensor) -> Tensor:
    """The bias [Q, Q] of as many keys as queries."""
    blocked = torch.full((query.shape[2],) * 2, -math.inf, device=query.device)
    return blocked.triu_(1)
