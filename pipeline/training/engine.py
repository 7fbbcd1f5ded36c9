"""The DeepSpeed engine: model and optimizer under ZeRO, built from the run's config; the
learning rate of a step; what is read out of the engine, and how an update is kept from its weights.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.distributed import World
from pipeline.model.config import ModelConfig
from pipeline.model.parameters import divide, full_shape
from pipeline.model.transformer import Transformer
from pipeline.model.transformers_backbone import empty_model
from pipeline.training.config import DeepSpeedConfig, OptimizerConfig, ScheduleConfig


def build_engine(
    model: nn.Module,
    world: World,
    *,
    optimizer: OptimizerConfig,
    config: DeepSpeedConfig,
    precision: str,
    micro_batch_size: int,
    accumulation_steps: int,
) -> Any:
    """Wrap `model` (weights in place, equal on all ranks, or cut up over them in stage 3) in a
    DeepSpeed engine."""
    import deepspeed

    if config.stage < 3:
        model.to(world.device)
    groups = parameter_groups(model, optimizer.weight_decay)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(
            [{key: value for key, value in group.items() if key != "drafts"} for group in groups],
            lr=0.0,  # set before every step; see `forget_steps`
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.epsilon,
            # The fused kernel wants weights on a GPU, which offloading takes away from it.
            fused=world.device.type == "cuda" and not config.offload_optimizer,
        ),
        config=deepspeed_settings(
            optimizer, config, precision, micro_batch_size, accumulation_steps
        ),
        dist_init_required=False,
    )
    forget_steps(engine.optimizer)
    # Beside the groups, not in them: a checkpoint brings its own groups along.
    engine.rate_scales = [optimizer.draft_rate_scale if g["drafts"] else 1.0 for g in groups]
    return engine


@contextmanager
def deepspeed_log(path: Path) -> Iterator[None]:
    """What DeepSpeed prints within the context is appended to the file at `path`, and so is what it
    logs from here on; errors that matter it raises."""
    from deepspeed.utils import logger

    log = path.open("a", buffering=1, encoding="utf-8")
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(log)
    with redirect_stdout(log):
        yield


def forget_steps(optimizer: Any) -> None:
    """Take back the step with zero gradients by which DeepSpeed, in bf16 without ZeRO, allocates
    Adam's state: at a learning rate of 0 it moved no weight, but it was counted."""
    for state in getattr(optimizer, "optimizer", optimizer).state.values():
        if "step" in state:
            state["step"].zero_()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay, norms and biases without, and, where there are any, what only
    drafts (`drafts`), without decay too. Parameters that do not learn are in none."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    divided = divide([(name, full_shape(p)) for name, p in named])
    parameters, decays = dict(named), (weight_decay, 0.0, 0.0)
    return [
        {"params": [parameters[n] for n in names], "weight_decay": decay, "drafts": drafts}
        for names, decay, drafts in zip(divided, decays, (False, False, True), strict=True)
        if names
    ]


def deepspeed_settings(
    optimizer: OptimizerConfig,
    config: DeepSpeedConfig,
    precision: str,
    micro_batch_size: int,
    accumulation_steps: int,
) -> dict[str, Any]:
    """DeepSpeed's own configuration. Clipping and overflow checks are always stated: their
    defaults changed between releases."""
    bf16 = precision == "bf16"
    zero: dict[str, Any] = {"stage": config.stage}
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if config.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": optimizer.gradient_clipping,
        "zero_optimization": zero,
        "bf16": {"enabled": bf16, "check_grad_overflow": bf16},
        "fp16": {"enabled": False},
        # DeepSpeedCPUAdam compiles at run time; torch's AdamW works everywhere.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
    if config.stage > 0:
        # Without ZeRO DeepSpeed accumulates in the weights' own type and refuses another.
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    for key, value in config.extra.items():
        merged = settings.get(key)
        both = isinstance(merged, dict) and isinstance(value, dict)
        settings[key] = {**merged, **value} if both else value  # type: ignore[dict-item]
    return settings


def set_learning_rate(engine: Any, rate: float) -> None:
    """Set the step's rate; weights that only draft have theirs in proportion."""
    groups = engine.optimizer.param_groups
    for group, scale in zip(groups, engine.rate_scales, strict=True):
        group["lr"] = rate * scale


def gradient_norm(engine: Any) -> float:
    """Norm of the accumulated gradients before clipping; call it before `engine.step()`.

    Only meaningful without ZeRO in fp32, where DeepSpeed clips without keeping the norm.
    """
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0


Refuses = Callable[[float], bool]
"""Whether the update whose gradient has this norm is not to happen; alike on all ranks."""


def is_plain(engine: Any) -> bool:
    """Whether torch's own optimizer runs without DeepSpeed around it: fp32 without ZeRO."""
    return not engine.zero_optimization() and not engine.bfloat16_enabled()


def discard_step(engine: Any) -> float:
    """Go past an accumulation boundary with weights and optimizer state as they were.

    All ranks call it, after the backward passes. Returns NaN, for the norm of the gradient.
    """
    with updates_refused(engine):
        engine.step()
    return math.nan


@contextmanager
def updates_refused(engine: Any, refuses: Refuses | None = None) -> Iterator[list[float]]:
    """Within the context `engine.step()` leaves weights and optimizer state as they are, where
    `refuses(norm)`, or always without it; everything else of the step happens as always.

    Only the call of torch's optimizer is left out, in which all of DeepSpeed's wrappers end,
    whatever buffers of the stage or of offloading hold the gradient. They take the global norm
    before it, which nobody has before `engine.step()`, and what they copy from masters to weights
    behind it is what was there. A plain optimizer has no norm: `refuses` is not for it. The context
    gives the norms of the updates that `refuses` kept away.
    """
    wrapper = engine.optimizer
    inner = wrapper if is_plain(engine) else wrapper.optimizer
    update = inner.step
    norms: list[float] = []

    def checked(*args: Any, **kwargs: Any) -> Any:
        if refuses is None:
            return None
        norm = wrapper._global_grad_norm
        if norm is not None and refuses(float(norm)):
            norms.append(float(norm))
            return None
        return update(*args, **kwargs)

    inner.step = checked
    try:
        yield norms
    finally:
        inner.step = update


def full_copy(engine: Any, config: ModelConfig, known: int | None = None) -> Transformer:
    """A plain model with the engine's current weights, on every rank; all ranks must call it.

    Evals decode with this copy: forwards through a partitioned module would need all ranks in
    step, and decoding is different on each. `known` are the ids of the tokenizer (`Head`).
    """
    import deepspeed

    parameters = dict(engine.module.named_parameters())
    first = next(iter(parameters.values()))
    model = empty_model(config, first.device, first.dtype)
    partitioned = engine.zero_optimization_partition_weights()
    with torch.no_grad():
        for name, target in model.named_parameters():
            source = parameters[name]
            with deepspeed.zero.GatheredParameters([source], enabled=partitioned):
                target.copy_(source)
    model.lm_head.known = known
    return model.eval()


def learning_rate(step: int, steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """Rate of optimizer step `step`, counted from 0, of a run of `steps`."""
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    span = max(steps - 1 - schedule.warmup_steps, 1)
    progress = min((step - schedule.warmup_steps) / span, 1.0)
    share = 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * (schedule.final_share + (1.0 - schedule.final_share) * share)
