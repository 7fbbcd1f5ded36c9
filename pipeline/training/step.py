"""One optimizer step, in the order of the method."""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from pipeline.data.batch import Batch
from pipeline.distributed import World
from pipeline.model.attention import section_masks, training_mask
from pipeline.objective.head_loss import SUMS, head_loss
from pipeline.objective.joint import ObjectiveConfig
from pipeline.objective.targets import make_targets, place_weights
from pipeline.training.engine import gradient_norm, set_learning_rate
from pipeline.training.guards.discard import Refuses, discard_step, is_plain, updates_refused

Judge = Callable[[str, float], bool]
"""Whether a step with this `loss` or `grad_norm` is not to count; alike on all ranks."""


@dataclass(frozen=True)
class GlobalCounts:
    """Labelled and clean tokens of a step's global batch."""

    ar_labels: int
    diffusion_labels: int
    clean_tokens: int
    stop_requests: int
    """Ranks that were asked to stop."""
    draft_weight: float
    """Summed weights of the mask slots; their number, where all count alike."""
    attention_pairs: int = 0
    """Pairs of query and key that the rule allows."""
    damaged_shards: int = 0
    """Shards that some rank had to leave out since the last step; each counts those it met."""
    teacher_rows: int = 0
    """Rows that go through the LM head once more, forward only: what drafts are compared with, and
    drafts whose weight depends on what they are."""
    alone_labels: int = 0
    """Labelled rows of drafts without slots."""
    alone_draft_weight: float = 0.0
    """Their summed weights, as `draft_weight`."""
    unlabelled_slots: int = 0
    """Mask slots outside the places that their block drafts."""


@dataclass(frozen=True)
class StepResult:
    """Global means of a step."""

    loss: float
    """What was minimised."""
    loss_ar: float
    """Plain cross entropy, whatever the objective makes of it; so are the next two."""
    loss_diffusion: float | None
    loss_alone: float | None
    """Of drafts without slots; None where the batch has none."""
    grad_norm: float
    seconds: float
    refused: str | None = None
    """`loss` or `grad_norm`, where the judge refused the step for it: no weight has moved."""

    @property
    def loss_is_finite(self) -> bool:
        return math.isfinite(self.loss)

    @property
    def finite(self) -> bool:
        return self.loss_is_finite and math.isfinite(self.grad_norm)


def count_globally(
    batches: list[Batch],
    world: World,
    stop_requested: bool,
    objective: ObjectiveConfig,
    damaged_shards: int = 0,
) -> GlobalCounts:
    """Sum this rank's counts over all ranks; carries the stop flag along, so all ranks agree, and
    how many damaged shards the rank has met."""
    weights = [place_weights(batch, objective).double() for batch in batches]
    slots = [batch.diffusion_labels for batch in batches]
    own = [
        sum(batch.ar_labels for batch in batches),
        sum(slots),
        sum(batch.clean_tokens for batch in batches),
        int(stop_requested),
        sum(float(part[:end].sum()) for part, end in zip(weights, slots, strict=True)),
        sum(batch.attention_pairs for batch in batches),
        damaged_shards,
        sum(batch.alone_labels for batch in batches),
        sum(float(part[end:].sum()) for part, end in zip(weights, slots, strict=True)),
        sum(batch.slots - batch.diffusion_labels for batch in batches),
    ]
    ar, diffusion, clean, stops, weight, *whole = world.sum([float(value) for value in own])
    pairs, damaged, alone = map(int, whole[:3])
    drafted = int(diffusion) + alone
    return GlobalCounts(
        int(ar), int(diffusion), int(clean), int(stops), weight, pairs, damaged,
        teacher_rows=drafted * objective.extra_heads,
        alone_labels=alone,
        alone_draft_weight=whole[3],
        unlabelled_slots=int(whole[4]),
    )  # fmt: skip


def digests_in_order(batches: list[Batch], world: World) -> list[bytes]:
    """SHA-256 of each sequence of the step's global batch, in the order of the run."""
    rounds = len(batches)
    parts = world.gather_bytes(b"".join(batch.digests for batch in batches))
    size = len(parts[0]) // rounds
    ordered = b"".join(part[a * size : (a + 1) * size] for a in range(rounds) for part in parts)
    return [ordered[i : i + 32] for i in range(0, len(ordered), 32)]


def train_step(
    engine: Any,
    batches: list[Batch],
    counts: GlobalCounts,
    objective: ObjectiveConfig,
    world: World,
    learning_rate: float,
    attention: str = "auto",
    refuses: Judge | None = None,
) -> StepResult:
    """Forward and backward over the micro-batches, then one optimizer step.

    Weights and optimizer state are left as they were, on all ranks alike, when the loss or the
    gradient is not finite, or when `refuses` says so of one of them.
    """
    started = time.perf_counter()
    own = accumulate(engine, batches, counts, objective, world, attention)
    loss, ar_total, diffusion_total, _, alone_total = world.sum(own)
    loss_ar = ar_total / max(counts.ar_labels, 1)
    loss_diffusion = diffusion_total / max(counts.diffusion_labels, 1) if objective.drafts else None
    loss_alone = alone_total / counts.alone_labels if counts.alone_labels else None
    refused: str | None = None

    def refuse(norm: float) -> bool:
        nonlocal refused
        if refused is None and refuses is not None and refuses("grad_norm", norm):
            refused = "grad_norm"
        return refused is not None

    if refuses is not None and math.isfinite(loss) and refuses("loss", loss):
        refused = "loss"
    if math.isfinite(loss):
        grad_norm = apply(engine, learning_rate, refuse if refuses is not None else None)
    else:
        grad_norm = discard_step(engine)
    seconds = time.perf_counter() - started
    return StepResult(loss, loss_ar, loss_diffusion, loss_alone, grad_norm, seconds, refused)


def accumulate(
    engine: Any,
    batches: list[Batch],
    counts: GlobalCounts,
    objective: ObjectiveConfig,
    world: World,
    attention: str = "auto",
) -> list[float]:
    """Gradients of the global loss into `engine`, by the backend `attention`; returns this rank's
    `head_loss.SUMS`."""
    # DeepSpeed averages over ranks and accumulation rounds; our losses are shares of a global mean.
    parts = world.size * len(batches)
    total = torch.zeros(len(SUMS), dtype=torch.float64, device=world.device)
    model = engine.module
    make_mask = section_masks if model.frozen_base else training_mask
    frozen = model.config.hidden_size if model.frozen_base else 0
    for batch in batches:
        # From the host's copy of the rule, and of what is labelled.
        mask = make_mask(batch.spans, world.device, attention)
        clean = batch.spans.clean_tokens
        targets = make_targets(
            batch, objective, counts.ar_labels, counts.draft_weight, counts.alone_draft_weight
        ).to(world.device)
        batch = batch.to(world.device)
        loss, sums = engine(
            batch.input_ids,
            position_ids=batch.position_ids,
            mask=mask,
            then=partial(head_loss, targets=targets, frozen=frozen),
            clean=clean,
            blocks=batch.blocks,
        )
        engine.backward(loss * parts)
        total += sums
        if not engine.is_gradient_accumulation_boundary():
            engine.step()
    return total.tolist()


def apply(engine: Any, learning_rate: float, refuses: Refuses | None = None) -> float:
    """Clip and update the weights, unless `refuses(norm)`; returns the gradient norm before
    clipping."""
    set_learning_rate(engine, learning_rate)
    if is_plain(engine):
        own_norm = gradient_norm(engine)
        if not math.isfinite(own_norm):
            return discard_step(engine)
        if refuses is not None and refuses(own_norm):
            discard_step(engine)
        else:
            engine.step()
        return own_norm
    with updates_refused(engine, refuses) if refuses is not None else nullcontext():
        engine.step()
    norm = engine.get_global_grad_norm()
    return float(norm) if norm is not None else math.nan
