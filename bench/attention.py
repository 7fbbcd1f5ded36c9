"""Attention alone, forward and backward: the joint sections under each form of the mask.

The yardstick is causal attention over the clean section, ignoring documents. At full coverage the
rule allows about twice as many pairs of query and key, and a dense mask computes eight times as
many. Each length is measured with one document a sequence and with many.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.inputs import PRECISIONS, model_config, random_batch
from bench.measure import Work, interleaved, peak_bytes, ratio
from bench.results import Outcome
from pipeline.model.attention import Mask, attend, training_mask
from pipeline.model.config import ModelConfig
from pipeline.model.mask import Spans
from tidar_common.errors import UserError

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


def run(options: Options, device: torch.device, rounds: int, warmup: int) -> Outcome:
    if options.precision not in PRECISIONS:
        raise UserError(f"--precision: unknown value {options.precision!r}; known: fp32, bf16")
    config = model_config(options.model, 512, options.block_size)
    outcome = Outcome()
    for length in options.lengths:
        for name, mean in (("one document", 4 * length), ("documents", options.document_tokens)):
            measure(options, config, length, mean, f"S={length}, {name}: ", device, rounds, warmup,
                    outcome)  # fmt: skip
    return outcome


def measure(
    options: Options,
    config: ModelConfig,
    length: int,
    document_tokens: int,
    prefix: str,
    device: torch.device,
    rounds: int,
    warmup: int,
    outcome: Outcome,
) -> None:
    """Every form of the mask at one length, into `outcome`."""
    count = max(1, options.tokens // length)
    spans = random_batch(config, count, length, document_tokens, coverage=1.0).spans
    makers = {form: partial(training_mask, spans, device, form) for form in FORMS[device.type]}
    moved = spans.to(device)
    passes = {
        form: attention_pass(config, options.precision, moved, make())
        for form, make in makers.items()
    }
    clean = Spans(*(part[:, :length] for part in (moved.lower, moved.upper, moved.block)))
    passes["causal"] = attention_pass(config, options.precision, clean, None)
    samples = interleaved(passes, rounds=rounds, warmup=warmup, device=device)
    building = {f"make {form}": make for form, make in makers.items()}
    built = interleaved(building, rounds=rounds, warmup=warmup, device=device)
    outcome.add({**samples, **built}, prefix)
    for form, work in passes.items():
        variant = outcome.variants[prefix + form]
        variant["peak_bytes"] = peak_bytes(work, device)
        outcome.figures[f"{prefix}{form}: peak MB"] = variant["peak_bytes"] / 1e6
    for form in makers:
        outcome.ratios[f"{prefix}{form} / causal"] = ratio(samples[form], samples["causal"])
    for form in (other for other in makers if other != "dense"):
        # The target is the block-sparse kernel's, on a GPU at S = 4096.
        target = 3.0 if form == "flex" and length == 4096 else None
        outcome.ratios[f"{prefix}dense / {form}"] = ratio(
            samples["dense"], samples[form], at_least=target
        )


def attention_pass(config: ModelConfig, precision: str, spans: Spans, mask: Mask) -> Work:
    """Forward and backward of one layer's attention over as many rows as `spans` has."""
    batch, length = spans.block.shape
    device, dtype = spans.block.device, PRECISIONS[precision]

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
