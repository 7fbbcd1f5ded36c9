"""An optimizer step of one micro-batch: TiDAR at several coverages against its plain twin.

All variants see the same clean tokens and go through the step's own code: forward, backward,
clipping, AdamW. No DeepSpeed and no gradient exchange, which cost both alike. Targets: at most 2.0
times an AR step at full coverage, at most 1.3 times at a quarter.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch

from bench.inputs import model_config, new_model, random_batch
from bench.measure import interleaved, peak_bytes, ratio
from bench.results import Outcome
from pipeline.data.batch import Batch
from pipeline.distributed import World
from pipeline.model.transformer import Transformer
from pipeline.objective.joint import ObjectiveConfig
from pipeline.training.engine import parameter_groups
from pipeline.training.step import GlobalCounts, accumulate

COVERAGES = {1.0: 2.0, 0.5: None, 0.25: 1.3}
"""Coverage, and the most AR steps that a step may cost."""


@dataclass(frozen=True)
class Options:
    model: str = "tiny"
    """a shape of conf/model"""
    vocab_size: int = 2048
    """ids of the tokenizer; the last is the mask token"""
    length: int = 256
    """clean tokens of a sequence"""
    micro_batch_size: int = 8
    """sequences in the forward"""
    block_size: int = 8
    """K, the most positions a block drafts"""
    document_tokens: int = 128
    """mean length of the packed documents, in tokens"""
    precision: str = "fp32"
    """fp32 or bf16"""
    activation_checkpointing: str = "none"
    """none, selective or full"""
    compile: bool = False
    """torch.compile of the layers"""
    attention: str = "auto"
    """auto, flex, tiles or dense"""


class PlainEngine:
    """What the training step needs of DeepSpeed's engine, without DeepSpeed."""

    def __init__(self, model: Transformer) -> None:
        self.module = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def is_gradient_accumulation_boundary(self) -> bool:
        return True


def training_step(
    model: Transformer, batch: Batch, device: torch.device, attention: str = "auto"
) -> Callable[[], None]:
    """One update from `batch`, which has a mask section or not, small enough to leave the weights
    much as they are."""
    objective = ObjectiveConfig("tidar" if batch.diffusion_labels else "ar")
    counts = GlobalCounts(
        batch.ar_labels, batch.diffusion_labels, batch.clean_tokens, 0, batch.diffusion_labels
    )
    engine = PlainEngine(model.train())
    optimizer = torch.optim.AdamW(
        parameter_groups(model, weight_decay=0.1), lr=1e-7, fused=device.type == "cuda"
    )
    # A world of one needs no group: accumulating asks nothing of other ranks.
    world = World(0, 1, device, cast(Any, None))

    def step() -> None:
        accumulate(engine, [batch], counts, objective, world, attention)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def run(options: Options, device: torch.device, rounds: int, warmup: int) -> Outcome:
    config = model_config(options.model, options.vocab_size, options.block_size)
    model = new_model(config, options.precision, device)
    model.checkpoint_activations(options.activation_checkpointing)
    if options.compile:
        model.compile_layers()
    steps = {}
    for coverage in (*COVERAGES, None):
        name = "ar" if coverage is None else f"tidar, coverage {coverage:g}"
        batch = random_batch(
            config, options.micro_batch_size, options.length, options.document_tokens, coverage
        )
        steps[name] = training_step(model, batch, device, options.attention)
    samples = interleaved(steps, rounds=rounds, warmup=warmup, device=device)
    outcome = Outcome()
    outcome.add(samples)
    clean_tokens = options.micro_batch_size * options.length
    for name, step in steps.items():
        variant = outcome.variants[name]
        variant["peak_bytes"] = peak_bytes(step, device)
        variant["clean_tokens_per_second"] = clean_tokens / variant["wall_seconds"]["median"]
        outcome.figures[f"{name}: peak MB"] = variant["peak_bytes"] / 1e6
    for coverage, target in COVERAGES.items():
        name = f"tidar, coverage {coverage:g}"
        outcome.ratios[f"{name} / ar"] = ratio(samples[name], samples["ar"], at_most=target)
    outcome.figures["parameters"] = config.num_parameters
    outcome.figures["clean tokens"] = clean_tokens
    return outcome
