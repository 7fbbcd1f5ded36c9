"""Attention alone, forward and backward: the joint sections under each form of the mask.

The yardstick is causal attention over the clean section, ignoring documents. At full coverage the
rule allows about twice as many pairs of query and key, and a dense mask computes eight times as
many. Each length is measured with one document a sequence and with many.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.inputs import model_config, precision, random_batch
from bench.measure import Work
from bench.results import Bench
from pipeline.model.attention import Mask, attend, training_mask
from pipeline.model.config import ModelConfig
from pipeline.model.mask import Spans

FORMS = {"cpu": ("dense", "tiles"), "cuda": ("dense", "tiles", "flex")}
"""Backends that can run backward on a device."""


@dataclass(frozen=True)
class Options:
    model: str = "tiny"
    """a shape of conf/model; its heads are used, one layer"""
    lengths: tuple[int, ...] = (512, 1024, 2048)
    """clean tokens of a sequence; several are measured one after another"""
    tokens: int = 2048
    """clean tokens of a batch: sequences are as many as fit"""
    block_size: int = 8
    """K, the most positions a block drafts"""
    document_tokens: int = 128
    """mean length of the packed documents where there are many, in tokens"""
    precision: str = "fp32"
    """fp32 or bf16"""


def run(options: Options, bench: Bench) -> None:
    config = model_config(options.model, 512, options.block_size)
    for length in options.lengths:
        for name, mean in (("one document", 4 * length), ("documents", options.document_tokens)):
            measure(options, config, length, mean, f"S={length}, {name}: ", bench)


def measure(
    options: Options, config: ModelConfig, length: int, document_tokens: int, prefix: str,
    bench: Bench,
) -> None:  # fmt: skip
    """Every form of the mask at one length."""
    device, dtype = bench.device, precision(options.precision)
    count = max(1, options.tokens // length)
    spans = random_batch(config, count, length, document_tokens, coverage=1.0).spans
    makers = {form: partial(training_mask, spans, device, form) for form in FORMS[device.type]}
    moved = spans.to(device)
    passes = {form: attention_pass(config, dtype, moved, make()) for form, make in makers.items()}
    clean = Spans(*(part[:, :length] for part in (moved.lower, moved.upper, moved.block)))
    passes["causal"] = attention_pass(config, dtype, clean, None)
    samples = bench.time(passes, prefix)
    bench.time({f"make {form}": make for form, make in makers.items()}, prefix)
    bench.weigh(passes, prefix)
    for form in makers:
        bench.divide(samples, form, "causal", prefix)
    for form in (other for other in makers if other != "dense"):
        # The target is the block-sparse kernel's, on a GPU at S = 4096.
        target = 3.0 if form == "flex" and length == 4096 else None
        bench.divide(samples, "dense", form, prefix, at_least=target)


def attention_pass(config: ModelConfig, dtype: torch.dtype, spans: Spans, mask: Mask) -> Work:
    """Forward and backward of one layer's attention over as many rows as `spans` has."""
    batch, length = spans.block.shape
    device = spans.block.device

    def leaf(heads: int) -> Tensor:
        # As the projections leave them: [B, L, H, D], seen as [B, H, L, D].
        shape = (batch, length, heads, config.head_dim)
        return torch.randn(shape, device=device, dtype=dtype).requires_grad_()

    leaves = leaf(config.num_heads), leaf(config.num_kv_heads), leaf(config.num_kv_heads)
    upstream = torch.randn_like(leaves[0])

    def work() -> None:
        query, key, value = (x.transpose(1, 2) for x in leaves)
        output = attend(query, key, value, mask).transpose(1, 2)
        torch.autograd.grad(output, leaves, upstream)

    return work
