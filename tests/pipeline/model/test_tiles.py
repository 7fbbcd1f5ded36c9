"""Parts of an attention put together: the whole, by both ways of computing a part."""

import math

import pytest
import torch

from pipeline.model.tiles import (
    attend_part,
    attend_plainly,
    part_gradients,
    plain_gradients,
)

WAYS = {"fused": (attend_part, part_gradients), "plain": (attend_plainly, plain_gradients)}


def inputs(dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Query, key, value [2, 3, 7 or 11, 8] and a random bias of 0 and -inf, with a row that sees
    nothing in the first five keys."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, 3, n, 8, generator=generator).to(dtype) for n in (7, 11, 11)]
    bias = torch.where(torch.rand(2, 1, 7, 11, generator=generator) < 0.4, -math.inf, 0.0)
    bias[..., 10] = 0
    bias[:, :, 3, :5] = -math.inf
    return tensors, bias


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 3e-2)]
)
def test_two_parts_make_the_whole(way, dtype, tolerance):
    attend, gradients = WAYS[way]
    (query, key, value), bias = inputs(dtype)
    parts = (slice(0, 5), slice(5, 11))

    exact = [x.double().requires_grad_() for x in (query, key, value)]
    scores = exact[0] @ exact[1].mT / math.sqrt(8) + bias
    whole = scores.softmax(-1) @ exact[2]
    grad = torch.randn(whole.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = torch.autograd.grad(whole, exact, grad.double())

    found = [attend(query, key[:, :, p], value[:, :, p], bias[..., p]) for p in parts]
    found[0][1][:, :, 3] = -math.inf  # of a row without keys the number means nothing
    joint = torch.logaddexp(found[0][1], found[1][1])
    output = sum((lse - joint).exp().unsqueeze(-1) * out for out, lse in found).to(dtype)
    torch.testing.assert_close(joint.double(), scores.logsumexp(-1), rtol=0, atol=tolerance)
    torch.testing.assert_close(output.double(), whole, rtol=tolerance, atol=tolerance)

    grads = [
        gradients(grad, query, key[:, :, p], value[:, :, p], output, joint, bias[..., p])
        for p in parts
    ]
    summed = (
        grads[0][0] + grads[1][0], *(torch.cat([g[i] for g in grads], dim=2) for i in (1, 2))
    )  # fmt: skip
    for got, right in zip(summed, expected, strict=True):
        torch.testing.assert_close(got.double(), right, rtol=tolerance, atol=tolerance)


def test_no_bias_is_causal():
    (query, *_), _ = inputs(torch.float32)
    causal = torch.full((7, 7), -math.inf).triu(1)
    for got, right in zip(
        attend_part(query, query, query, None), attend_plainly(query, query, query, causal),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(got, right)


def test_other_devices_take_matrix_products():
    """`meta` stands for them: the fused kernel is there for CPUs alone."""
    query = torch.empty(2, 3, 7, 8, device="meta", dtype=torch.bfloat16)
    for bias in (None, torch.empty(2, 1, 7, 7, device="meta")):
        output, lse = attend_part(query, query, query, bias)
        assert output.dtype == torch.bfloat16
        assert lse.dtype == torch.float32
        found = part_gradients(output, query, query, query, output, lse, bias)
        assert all(x.shape == query.shape for x in (output, *found))
