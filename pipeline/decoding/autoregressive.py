"""Plain autoregressive decoding: one token a forward, with the same cache and the same kernels."""

from collections.abc import Iterator

import torch
from torch import Tensor

from pipeline.decoding.cache import KVCache
from pipeline.decoding.sampling import Sampling, draw
from pipeline.model.transformer import Transformer


def decode_ar(
    model: Transformer, prompt: Tensor, cache: KVCache, sampling: Sampling
) -> Iterator[list[int]]:
    """Yield one token a forward; arguments as in `decode_tidar`."""
    stream = sampling.generator(0, prompt.device)
    queries = prompt
    while True:
        positions = cache.length + torch.arange(len(queries), device=prompt.device)
        hidden = model.hidden(queries[None], positions, cache=cache)[0]
        cache.keep(len(queries))
        logits = model.lm_head(hidden[-1:])
        queries = (
            draw(sampling.probabilities(logits), stream)
            if sampling.temperature
            else (logits.argmax(-1))
        )
        yield [int(queries)]
