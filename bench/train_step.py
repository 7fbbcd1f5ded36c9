"""An optimizer step of one micro-batch: TiDAR at several coverages against its plain twin, all
weights learning or, on a frozen base, adapters and the mask slots' embedding alone.

All variants see the same clean tokens and go through the step's own code: forward, backward,
clipping, AdamW. No DeepSpeed and no gradient exchange, which cost both alike. Targets: at most 2.0
times an AR step at full coverage, at most 1.3 times at a quarter; with a frozen base at most 1.15
and 0.65 times, and gradients and optimizer states of at most a tenth.
"""

from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from bench.inputs import model_config, new_model, random_batch
from bench.measure import Work
from bench.results import Bench
from pipeline.data.batch import Batch
from pipeline.distributed import World
from pipeline.model.config import ADAPTER_TARGETS, ModelConfig
from pipeline.model.transformer import Transformer
from pipeline.objective.config import ObjectiveConfig
from pipeline.training.engine import parameter_groups
from pipeline.training.step import GlobalCounts, StepInput, accumulate

COVERAGES = {1.0: 2.0, 0.5: None, 0.25: 1.3}
"""Coverage, and the most AR steps that a step may cost."""
FROZEN_COVERAGES = {1.0: 1.15, 0.25: 0.65}
"""The same with a frozen base."""
MOST_STATES = 0.1
"""Of a frozen base's training, in those of full training."""


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
    adapter_rank: int = 8
    """of the adapters on all projections, with a frozen base"""


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
) -> Work:
    """One update from `batch`, which has a mask section or not, small enough to leave the weights
    much as they are."""
    objective = ObjectiveConfig("tidar" if batch.diffusion_labels else "ar")
    if model.frozen_base:
        objective = replace(objective, alpha=0.0)
    counts = GlobalCounts(
        batch.ar_labels, batch.diffusion_labels, batch.clean_tokens, 0, batch.diffusion_labels
    )
    data, engine = StepInput([batch], objective, attention), PlainEngine(model.train())
    optimizer = torch.optim.AdamW(
        parameter_groups(model, weight_decay=0.1), lr=1e-7, fused=device.type == "cuda"
    )
    # A world of one needs no group: accumulating asks nothing of other ranks.
    world = World(0, 1, device, cast(Any, None))

    def step() -> None:
        accumulate(engine, data, counts, world)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def build(config: ModelConfig, options: Options, device: torch.device) -> Transformer:
    model = new_model(config, options.precision, device)
    model.checkpoint_activations(options.activation_checkpointing)
    return model.compile_layers() if options.compile else model


def state_bytes(model: Transformer) -> int:
    """Bytes of gradients and of Adam's two moments of what learns."""
    return sum(3 * p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def run(options: Options, bench: Bench) -> None:
    config = model_config(options.model, options.vocab_size, options.block_size)
    model = build(config, options, bench.device)
    adapted = replace(
        config, adapter_rank=options.adapter_rank, own_mask_embedding=True,
        adapter_targets=ADAPTER_TARGETS if options.adapter_rank else (),
    )  # fmt: skip
    frozen = build(adapted, options, bench.device).freeze_base()
    steps: dict[str, Work] = {}
    variants: list[tuple[str, Transformer, float | None]] = [("ar", model, None)]
    variants += [(f"tidar, coverage {c:g}", model, c) for c in COVERAGES]
    variants += [(f"frozen, coverage {c:g}", frozen, c) for c in FROZEN_COVERAGES]
    for name, trained, coverage in variants:
        batch = random_batch(
            config, options.micro_batch_size, options.length, options.document_tokens, coverage
        )
        steps[name] = training_step(trained, batch, bench.device, options.attention)
    samples = bench.time(steps)
    bench.weigh(steps)
    clean_tokens = options.micro_batch_size * options.length
    for variant in bench.outcome.variants.values():
        variant["clean_tokens_per_second"] = clean_tokens / variant["wall_seconds"]["median"]
    for kind, targets in (("tidar", COVERAGES), ("frozen", FROZEN_COVERAGES)):
        for coverage, target in targets.items():
            bench.divide(samples, f"{kind}, coverage {coverage:g}", "ar", at_most=target)
    states, of_frozen = state_bytes(model), state_bytes(frozen)
    bench.outcome.figures |= {
        "parameters": config.num_parameters,
        "states MB": states / 1e6,
        "states MB, frozen": of_frozen / 1e6,
        "states, frozen / full": of_frozen / states,
        "states, frozen / full, at most": MOST_STATES,
        "clean tokens": clean_tokens,
    }
