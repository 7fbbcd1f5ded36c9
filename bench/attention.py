"""Attention alone, forward and backward: the joint sections under each form of the mask.

The yardstick is causal attention over the clean section. At full coverage the rule allows about
twice as many pairs of query and key, and a dense mask computes eight times as many.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.inputs import PRECISIONS, model_config, random_batch
from bench.measure import Work, interleaved, ratio
from bench.results import Outcome
from data_prep.errors import UserError
from pipeline.model.attention import Mask, TiledMask, attend
from pipeline.model.config import ModelConfig
from pipeline.model.mask import Spans

MASKS: dict[str, Callable[[Spans], Mask]] = {
    "dense": lambda spans: spans.dense().unsqueeze(1),
    "tiles": TiledMask.from_spans,
}
"""Forms of the mask; another backend is another line here."""
CPU_ONLY = {"tiles"}


@dataclass(frozen=True)
class Options:
    model: str = "tiny"
    """a shape of conf/model; its heads are used, one layer"""
    lengths: tuple[int, ...] = (256, 512, 1024)
    """clean tokens of a sequence; several are measured one after another"""
    tokens: int = 2048
    """clean tokens of a batch: sequences are as many as fit"""
    block_size: int = 8
    """K, the most positions a block drafts"""
    document_tokens: int = 0
    """mean length of the packed documents, in tokens; 0 is one document a sequence"""
    precision: str = "fp32"
    """fp32 or bf16"""


def run(options: Options, device: torch.device, rounds: int, warmup: int) -> Outcome:
    if options.precision not in PRECISIONS:
        raise UserError(f"--precision: unknown value {options.precision!r}; known: fp32, bf16")
    config = model_config(options.model, 512, options.block_size)
    outcome = Outcome()
    for length in options.lengths:
        batch = random_batch(
            config,
            max(1, options.tokens // length),
            length,
            options.document_tokens or 4 * length,
            coverage=1.0,
        )
        spans = batch.spans.to(device)
        forms = {n: make for n, make in MASKS.items() if device.type == "cpu" or n not in CPU_ONLY}
        passes = {
            name: attention_pass(config, options.precision, spans, make(spans))
            for name, make in forms.items()
        }
        clean = Spans(*(part[:, :length] for part in (spans.lower, spans.upper, spans.block)))
        passes["causal"] = attention_pass(config, options.precision, clean, None)
        samples = interleaved(passes, rounds=rounds, warmup=warmup, device=device)
        building = {f"make {name}": partial(make, spans) for name, make in forms.items()}
        built = interleaved(building, rounds=rounds, warmup=warmup, device=device)
        prefix = f"S={length}: "
        outcome.add({**samples, **built}, prefix)
        for name in forms:
            pair = f"{prefix}{name} / causal"
            outcome.ratios[pair] = ratio(samples[name], samples["causal"])
    return outcome


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
