"""The whole model's weights out of a DeepSpeed engine, whatever ZeRO stage holds them."""

from typing import Any

import torch

from pipeline.model.config import ModelConfig
from pipeline.model.transformer import Transformer


def full_copy(engine: Any, config: ModelConfig) -> Transformer:
    """A plain model with the engine's current weights, on every rank; all ranks must call it.

    Evals decode with this copy: forwards through a partitioned module would need all ranks in
    step, and decoding is different on each.
    """
    import deepspeed

    parameters = dict(engine.module.named_parameters())
    first = next(iter(parameters.values()))
    model = Transformer.empty(config, first.device, first.dtype)
    partitioned = engine.zero_optimization_partition_weights()
    with torch.no_grad():
        for name, target in model.named_parameters():
            source = parameters[name]
            with deepspeed.zero.GatheredParameters([source], enabled=partitioned):
                target.copy_(source)
    return model.eval()
