"""The plan of a run: every figure worked out before it starts, and what speaks against it."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from pipeline.data.batch import section_length
from pipeline.model.config import CHECKPOINTING
from pipeline.model.flops import StepFlops, allowed_pairs, step_flops
from pipeline.objective.loss import MEASURED
from pipeline.planning.config import Planned
from pipeline.planning.hardware import CPU, GPUS, Gpu, find_gpu, free_memory_bytes, recognise
from pipeline.planning.memory import (
    DEFAULT_BUCKET,
    BatchMemory,
    StaticMemory,
    batch_memory,
    checkpoint_bytes,
    element_bytes,
    largest_tensor,
    learning,
    static_memory,
)

GIB = 2**30
SECONDS_PER_DAY = 86_400
MOST_EPOCHS = 4
"""More passes over the same text are worth a word (Muennighoff et al., arXiv 2305.16264)."""
COVERAGES = (1.0, 0.5, 0.25)
"""What a plan compares."""


@dataclass(frozen=True)
class Memory:
    """Of one process, in bytes."""

    static: StaticMemory
    batch: BatchMemory
    evaluation: int
    """A whole copy of the weights, which evals decode with; activations are gone by then."""
    host_start: int
    """On the host, while the model is filled: the largest tensor in fp32, and the next one."""

    @property
    def peak(self) -> int:
        return self.static.total + max(self.batch.peak, self.evaluation, self.static.update)


@dataclass(frozen=True)
class Duration:
    """How long the run takes, at the assumed share of the peak rate."""

    step_s: float
    days: float
    gpu_hours: float
    tokens_per_second: float
    """Clean tokens, over all GPUs."""


@dataclass(frozen=True)
class Plan:
    """Figures of a run; `errors` keep it from starting, `warnings` do not."""

    planned: Planned
    gpu: Gpu
    accumulation_steps: int
    memory: Memory
    flops: StepFlops
    duration: Duration | None
    """None where the GPU's peak rate is not known."""
    checkpoint: int
    """Bytes of one checkpoint."""
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def tokens_per_step(self) -> int:
        """Clean tokens, padding included."""
        return self.planned.train.global_batch_size * self.planned.sequence_length

    @property
    def epochs(self) -> float:
        """Times that the run reads its data; 0 where there is none, or a mix of sets."""
        train = self.planned.train
        if train.mix:
            return 0.0
        return train.steps * train.global_batch_size / (train.manifest.train.sequences or math.inf)

    @property
    def room(self) -> float:
        """Bytes that a process may take; infinite where that is unknown."""
        if self.gpu.memory_gib is None:
            return math.inf
        reserve = 0.0 if self.gpu.name == CPU else self.planned.plan.reserve_gib
        return (self.gpu.memory_gib - reserve) * GIB

    @property
    def coverage_costs(self) -> dict[float, float]:
        """FLOPs of a step at some coverages, in steps of the AR twin."""
        twin = flops_at(self.planned, None).model
        return {c: flops_at(self.planned, c).model / twin for c in COVERAGES}

    @property
    def step_over_ar(self) -> float:
        """FLOPs of a step as planned, in steps of the AR twin."""
        return self.flops.model / flops_at(self.planned, None).model

    @property
    def kept_checkpoints(self) -> int:
        """Most checkpoints on disk at one time, the one that is being written included."""
        steps, config = self.planned.train.steps, self.planned.train.checkpoint
        total = -(-steps // config.every)
        if config.keep_last == 0:
            return total
        for_good = 0
        if config.keep_every:
            for_good = steps // math.lcm(config.every, config.keep_every)
            # One is always saved at the end.
            for_good += steps % config.keep_every == 0 and steps % config.every != 0
        return min(total, config.keep_last + 1 + for_good + config.keep_best)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; sizes in bytes, times in seconds unless the name says so."""
        planned, train = self.planned, self.planned.train
        return {
            "parameters": planned.model.num_parameters,
            "parameters_that_learn": learning(planned.model, train.freeze_base),
            "sequence_length": planned.sequence_length,
            "mask_slots": planned.num_slots,
            "coverage": planned.coverage,
            "block_size": planned.block_size,
            "steps": train.steps,
            "clean_tokens_per_step": self.tokens_per_step,
            "global_batch_size": train.global_batch_size,
            "micro_batch_size": train.micro_batch_size,
            "accumulation_steps": self.accumulation_steps,
            "processes": planned.cluster.processes,
            "precision": train.precision,
            "zero_stage": train.deepspeed.stage,
            "gpu": asdict(self.gpu),
            "memory": {
                **asdict(self.memory),
                "batch_peak": self.memory.batch.peak,
                "peak": self.memory.peak,
                "attention": planned.plan.attention,
            },
            "flops_per_step": {**asdict(self.flops), "model": self.flops.model},
            "flops_over_ar_by_coverage": {str(c): x for c, x in self.coverage_costs.items()},
            "assumed_mfu": planned.plan.mfu,
            "duration": asdict(self.duration) if self.duration else None,
            "checkpoint": self.checkpoint,
            "checkpoints_on_disk": self.kept_checkpoints,
            "errors": self.errors,
            "warnings": self.warnings,
        }


def make_plan(planned: Planned) -> Plan:
    """Work the plan out.

    Raises:
        UserError: when the global batch does not divide over the processes.
    """
    train, cluster = planned.train, planned.cluster
    gpu = device_of(planned)
    flops = flops_at(planned, planned.coverage if train.objective.drafts else None)
    plan = Plan(
        planned=planned,
        gpu=gpu,
        accumulation_steps=train.accumulation_steps(cluster.processes),
        memory=process_memory(planned, CPU if gpu.name == CPU else "cuda"),
        flops=flops,
        duration=duration(planned, gpu, flops),
        checkpoint=checkpoint_bytes(
            planned.model, train.deepspeed.stage, train.precision, train.freeze_base
        ),
    )
    judge(plan)
    return plan


def device_of(planned: Planned) -> Gpu:
    """What each process runs on. A check without `cluster.gpu` is about this machine; processes
    without a GPU share the memory that is free on it."""
    cluster, name = planned.cluster, planned.cluster.gpu
    if name is None and planned.check:
        name = CPU
        if torch.cuda.is_available():
            called = torch.cuda.get_device_name()
            known = recognise(called)
            name = known.name if known else called
    memory_gib = cluster.memory_gib
    if name == CPU and memory_gib is None and (free := free_memory_bytes()) is not None:
        memory_gib = free / GIB / cluster.gpus_per_node
    return find_gpu(name, memory_gib, cluster.tflops)


def flops_at(planned: Planned, coverage: float | None) -> StepFlops:
    """FLOPs of an optimizer step at another coverage; None is the AR twin's."""
    length, most = planned.sequence_length, planned.block_slots
    slots = 0 if coverage is None else section_length(length, coverage, most)
    drafted = -(-slots * planned.block_size // most)  # of a longer block only K places are
    alone = 0
    if planned.model.draft_rank:
        alone = round(planned.train.objective.alone_share * drafted * (1 - 1 / planned.block_size))
    return step_flops(
        planned.model,
        sequences=planned.train.global_batch_size,
        rows=length + slots,
        pairs=allowed_pairs(length, most, coverage, planned.model.causal_slots),
        labelled=length + drafted + alone,
        checkpointing=planned.train.activation_checkpointing,
        teacher_rows=drafted * planned.train.objective.extra_heads,
        slots=slots,
        drafted=drafted,
        alone=alone,
        frozen=planned.train.freeze_base and slots > 0,
        measured=MEASURED,
    )


def process_memory(planned: Planned, device: str) -> Memory:
    """Memory of one process on a kind of `device`, `cuda` or `cpu`, one process a GPU."""
    train, model = planned.train, planned.model
    zero = train.deepspeed.extra.get("zero_optimization", {})
    bucket = int(zero.get("reduce_bucket_size", DEFAULT_BUCKET))
    if device == CPU:  # the host gives a page when it is written, and only gradients are
        bucket = min(bucket, learning(model, train.freeze_base))
    static = static_memory(
        model,
        stage=train.deepspeed.stage,
        precision=train.precision,
        processes=planned.cluster.processes,
        offload=train.deepspeed.offload_optimizer,
        offload_weights=train.deepspeed.offload_parameters,
        bucket=bucket,
        frozen=train.freeze_base,
    )
    batch = batch_memory(
        model,
        precision=train.precision,
        sequences=train.micro_batch_size,
        rows=planned.rows,
        checkpointing=train.activation_checkpointing,
        attention=planned.plan.attention,
        device=device,
        frozen_rows=planned.sequence_length if train.freeze_base else 0,
    )
    return Memory(
        static=static,
        batch=batch,
        evaluation=element_bytes(train.precision) * model.num_parameters,
        host_start=2 * element_bytes("fp32") * largest_tensor(model),
    )


def duration(planned: Planned, gpu: Gpu, flops: StepFlops) -> Duration | None:
    """Time of the run without evals, checkpoints and waiting; None for an unknown GPU."""
    peak = gpu.tflops(planned.train.precision)
    if peak is None:
        return None
    processes = planned.cluster.processes
    step_s = flops.model / (planned.plan.mfu * peak * 1e12 * processes)
    run_s = step_s * planned.train.steps
    tokens = planned.train.global_batch_size * planned.sequence_length
    return Duration(step_s, run_s / SECONDS_PER_DAY, run_s / 3600 * processes, tokens / step_s)


def judge(plan: Plan) -> None:
    """Say what keeps the run from starting, and what its user should know."""
    train, unknown = plan.planned.train, []
    if plan.gpu.memory_gib is None:
        unknown.append("memory is not judged (give cluster.memory_gib)")
    elif plan.memory.peak > plan.room:
        plan.errors.append(
            f"memory: {plan.memory.peak / GIB:.1f} GiB do not fit into {plan.room / GIB:.1f} GiB "
            f"({where(plan)}); try {remedy(plan)}"
        )
    if plan.epochs > MOST_EPOCHS:
        plan.warnings.append(
            f"steps: the run reads its {train.manifest.train.sequences:,} sequences "
            f"{plan.epochs:,.1f} times, and beyond {MOST_EPOCHS} times text teaches little more; "
            "take fewer steps, or more data"
        )
    if plan.duration is None and plan.gpu.name != CPU:
        unknown.append(
            f"time is not estimated (give cluster.tflops, the peak in {train.precision})"
        )
    if unknown:
        plan.warnings.append(
            f"cluster.gpu: {plan.gpu.name}: unknown hardware, so {' and '.join(unknown)}; "
            f"known are {', '.join(GPUS)}"
        )


def where(plan: Plan) -> str:
    """What the room for a process is made of."""
    cluster, memory = plan.planned.cluster, plan.gpu.memory_gib
    if plan.gpu.name != CPU:
        return f"{memory:g} less plan.reserve_gib={plan.planned.plan.reserve_gib:g}"
    if cluster.memory_gib is not None:
        return "cluster.memory_gib"
    return (
        f"what is free on this host, shared by {cluster.gpus_per_node}; for another say "
        "cluster.gpu or cluster.memory_gib"
    )


def more_checkpointing(how: str) -> str | None:
    """The next kind of activation checkpointing; None after the last."""
    left = CHECKPOINTING[CHECKPOINTING.index(how) + 1 :]
    return f"activation_checkpointing={left[0]}" if left else None


def remedy(plan: Plan) -> str:
    """The next knob to turn, the one that costs least speed first."""
    train, memory = plan.planned.train, plan.memory
    if memory.batch.peak > max(memory.static.total, memory.evaluation):
        kept = memory.batch.activations > memory.batch.logits
        if kept and (more := more_checkpointing(train.activation_checkpointing)):
            return more
        if train.micro_batch_size > 1:
            return f"micro_batch_size={train.micro_batch_size // 2}"
    if train.deepspeed.stage < 3 and plan.planned.cluster.processes > 1:
        return f"deepspeed=zero{train.deepspeed.stage + 1}"
    if more := more_checkpointing(train.activation_checkpointing):
        return more
    if train.micro_batch_size > 1:
        return f"micro_batch_size={train.micro_batch_size // 2}"
    if not train.deepspeed.offload_optimizer and train.deepspeed.stage > 0:
        return "deepspeed.offload_optimizer=true, or more nodes"
    return "more nodes, GPUs with more memory, a smaller layout.coverage or shorter sequences"
