"""One optimizer step, in the order of the method."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.data.batch import Batch
from pipeline.distributed import World
from pipeline.model.attention import section_masks, training_mask
from pipeline.objective.config import ObjectiveConfig
from pipeline.objective.head_loss import SUMS, head_loss
from pipeline.objective.loss import make_targets, place_weights
from pipeline.training.engine import (
    Refuses,
    discard_step,
    gradient_norm,
    is_plain,
    set_learning_rate,
    updates_refused,
)
from tidar_common.progress import doing

Judge = Callable[[str, float], bool]
"""Whether a step with this `loss` or `grad_norm` is not to count; alike on all ranks."""


@dataclass
class StepInput:
    """The micro-batches of this rank in one optimizer step, and what is made of them."""

    batches: list[Batch]
    objective: ObjectiveConfig
    """With the weights of this step (`ObjectiveConfig.at`)."""
    attention: str = "auto"
    """Backend of the attention."""

    @cached_property
    def weights(self) -> list[Tensor]:
        """`place_weights` of each batch, fp32 [D] each."""
        return [place_weights(batch, self.objective.position_decay) for batch in self.batches]


@dataclass(frozen=True)
class GlobalCounts:
    """What a step's batches hold: of one rank, or summed over all. All sums are over batches."""

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
    """Labelled rows of drafts of the head alone."""
    alone_draft_weight: float = 0.0
    """Their summed weights, as `draft_weight`."""
    unlabelled_slots: int = 0
    """Mask slots outside the places that their block drafts."""

    def summed(self, world: World) -> "GlobalCounts":
        """Over all ranks, which call it together."""
        totals = world.sum([float(getattr(self, f.name)) for f in fields(self)])
        named: dict[str, Any] = {}
        for f, total in zip(fields(self), totals, strict=True):
            named[f.name] = int(total) if f.type is int else total
        return GlobalCounts(**named)


@dataclass(frozen=True)
class StepResult:
    """Global means of a step."""

    loss: float
    """What was minimised."""
    loss_ar: float
    """Plain cross entropy, whatever the objective makes of it; so are the next two."""
    loss_diffusion: float | None
    loss_alone: float | None
    """Of drafts of the head alone; None where the batch has none."""
    grad_norm: float
    """Not a number where the loss alone decided that no weight moves."""
    refused: str | None = None
    """`loss` or `grad_norm`, where the judge refused the step for it: no weight has moved."""

    @property
    def loss_is_finite(self) -> bool:
        return math.isfinite(self.loss)

    @property
    def applied(self) -> bool:
        """Whether the weights have moved."""
        return self.loss_is_finite and math.isfinite(self.grad_norm) and self.refused is None


def count_globally(
    step: StepInput, world: World, *, stop_requested: bool = False, damaged_shards: int = 0
) -> GlobalCounts:
    """Sum this rank's counts over all ranks; carries along whether it was asked to stop, so that
    all ranks agree, and how many damaged shards it has met."""
    batches, slots = step.batches, [batch.diffusion_labels for batch in step.batches]
    weights = [weight.double() for weight in step.weights]
    alone = sum(batch.alone_labels for batch in batches)
    return GlobalCounts(
        ar_labels=sum(batch.ar_labels for batch in batches),
        diffusion_labels=sum(slots),
        clean_tokens=sum(batch.clean_tokens for batch in batches),
        stop_requests=int(stop_requested),
        draft_weight=sum(float(w[:end].sum()) for w, end in zip(weights, slots, strict=True)),
        attention_pairs=sum(batch.attention_pairs for batch in batches),
        damaged_shards=damaged_shards,
        teacher_rows=(sum(slots) + alone) * step.objective.extra_heads,
        alone_labels=alone,
        alone_draft_weight=sum(float(w[end:].sum()) for w, end in zip(weights, slots, strict=True)),
        unlabelled_slots=sum(batch.slots - batch.diffusion_labels for batch in batches),
    ).summed(world)


def digests_in_order(batches: list[Batch], world: World) -> list[bytes]:
    """SHA-256 of each sequence of the step's global batch, in the order of the run."""
    rounds = len(batches)
    parts = world.gather_bytes(b"".join(batch.digests for batch in batches))
    size = len(parts[0]) // rounds
    ordered = b"".join(part[a * size : (a + 1) * size] for a in range(rounds) for part in parts)
    return [ordered[i : i + 32] for i in range(0, len(ordered), 32)]


def train_step(
    engine: Any,
    step: StepInput,
    counts: GlobalCounts,
    world: World,
    learning_rate: float,
    refuses: Judge | None = None,
) -> StepResult:
    """Forward and backward over the micro-batches, then one optimizer step.

    Weights and optimizer state are left as they were, on all ranks alike, when the loss or the
    gradient is not finite, or when `refuses` says so of one of them.
    """
    loss, ar, diffusion, _, alone = world.sum(accumulate(engine, step, counts, world))
    drafts = step.objective.drafts
    refused: str | None = None
    if not math.isfinite(loss):
        grad_norm = discard_step(engine)
    elif refuses is not None and refuses("loss", loss):
        grad_norm, refused = discard_step(engine), "loss"
    else:
        judge = partial(refuses, "grad_norm") if refuses is not None else None
        grad_norm, norm_refused = apply(engine, learning_rate, judge)
        refused = "grad_norm" if norm_refused else None
    return StepResult(
        loss=loss,
        loss_ar=ar / max(counts.ar_labels, 1),
        loss_diffusion=diffusion / max(counts.diffusion_labels, 1) if drafts else None,
        loss_alone=alone / counts.alone_labels if counts.alone_labels else None,
        grad_norm=grad_norm,
        refused=refused,
    )


def accumulate(engine: Any, step: StepInput, counts: GlobalCounts, world: World) -> list[float]:
    """Gradients of the global loss into `engine`; returns this rank's `head_loss.SUMS`.

    The model calls the loss itself, as `then`: with the LM head's matrix at hand, logits need
    never stand whole.
    """
    # DeepSpeed averages over ranks and accumulation rounds; our losses are shares of a global mean.
    parts = world.size * len(step.batches)
    total = torch.zeros(len(SUMS), dtype=torch.float64, device=world.device)
    model = engine.module
    make_mask = section_masks if model.frozen_base else training_mask
    frozen = model.config.hidden_size if model.frozen_base else 0
    for number, (batch, weights) in enumerate(zip(step.batches, step.weights, strict=True), 1):
        doing.part("micro-batch", number, len(step.batches))
        # From the host's copy of the rule, and of what is labelled.
        mask = make_mask(batch.spans, world.device, step.attention)
        clean = batch.spans.clean_tokens
        targets = make_targets(
            batch,
            step.objective,
            counts.ar_labels,
            counts.draft_weight,
            counts.alone_draft_weight,
            weights,
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


class Update(NamedTuple):
    """What came of an optimizer step."""

    norm: float
    """Of the gradient before clipping; not a number where it is not finite."""
    refused: bool = False


def apply(engine: Any, learning_rate: float, refuses: Refuses | None = None) -> Update:
    """Clip and update the weights, unless `refuses(norm)`."""
    set_learning_rate(engine, learning_rate)
    if is_plain(engine):
        plain_norm = gradient_norm(engine)
        if not math.isfinite(plain_norm):
            return Update(discard_step(engine))
        if refuses is not None and refuses(plain_norm):
            discard_step(engine)
            return Update(plain_norm, refused=True)
        engine.step()
        return Update(plain_norm)
    if refuses is None:
        engine.step()
        refused = False
    else:
        with updates_refused(engine, refuses) as norms:
            engine.step()
        refused = bool(norms)
    norm = engine.get_global_grad_norm()
    return Update(float(norm) if norm is not None else math.nan, refused)


@dataclass(frozen=True)
class StepDone:
    """A step of the run that was made, whatever came of it."""

    step: int
    """Steps done, with this one."""
    result: StepResult
    counts: GlobalCounts
    learning_rate: float
    first_sequence: int
    last_sequence: int
    """Order numbers of the run, both included."""
    seconds: float
    """Wall time, waiting for data included."""
    waited: float
    """Seconds of it that were spent on data."""

    @property
    def sequences(self) -> dict[str, int]:
        """For events."""
        return {"first_sequence": self.first_sequence, "last_sequence": self.last_sequence}
