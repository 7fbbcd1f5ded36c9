"""A plan for people, as lines of text."""

from pipeline.planning.hardware import CPU
from pipeline.planning.memory import learning
from pipeline.planning.plan import GIB, Plan
from tidar_common.tables import Table

Rows = list[tuple[str, str, str]]
"""Name, value, remark."""


def describe(plan: Plan) -> str:
    """The plan, and last what is wrong with it."""
    parts = [("run", run_rows(plan)), ("memory per GPU", memory_rows(plan)),
             ("time and disk", cost_rows(plan))]  # fmt: skip
    lines = [f"{title}\n{Table((), rows, left=(0, 2)).text('  ')}" for title, rows in parts]
    return "\n".join([*lines, *(f"note: {text}" for text in plan.warnings)])


def run_rows(plan: Plan) -> Rows:
    planned, train = plan.planned, plan.planned.train
    model, cluster = planned.model, planned.cluster
    sections = f"{planned.sequence_length} clean"
    if planned.num_slots:
        sections += f" + {planned.num_slots} mask"
    learn = learning(model, train.freeze_base)
    frozen = f"; {learn:,} learn, the base is frozen" if train.freeze_base else ""
    drafted = f"coverage {planned.coverage:g}, K = {planned.block_size}"
    return [
        ("parameters", f"{model.num_parameters:,}", f"vocabulary {model.vocab_size}{frozen}"),
        ("GPUs", f"{cluster.processes}", f"{cluster.nodes} nodes x {cluster.gpus_per_node}, "
         f"{plan.gpu.name}"),
        ("rows of a sequence", f"{planned.rows}", f"{sections}, {drafted}" if planned.num_slots
         else f"{sections}, objective=ar"),
        ("sequences a step", f"{train.global_batch_size}", f"{train.micro_batch_size} a forward x "
         f"{plan.accumulation_steps} accumulation steps x {cluster.processes} GPUs"),
        ("clean tokens a step", f"{plan.tokens_per_step:,}", "padding included"),
        ("steps", f"{train.steps:,}",
         f"{train.steps * plan.tokens_per_step:,} clean tokens in all"),
    ]  # fmt: skip


def memory_rows(plan: Plan) -> Rows:
    train, static, batch = plan.planned.train, plan.memory.static, plan.memory.batch
    stage, checkpointing = f"ZeRO {train.deepspeed.stage}", train.activation_checkpointing
    offloaded = ", on the host" if train.deepspeed.offload_optimizer else ""
    node = plan.planned.cluster.gpus_per_node
    host = f"per node: {gib(plan.memory.host_start * node)} while {node} processes fill the model"
    if static.host:
        host += f", {gib(static.host * node)} offloaded"
    return [
        ("weights", gib(static.weights), f"{train.precision}, {stage}"),
        ("gradients", gib(static.gradients), stage),
        ("optimizer states", gib(static.optimizer), f"fp32, {stage}{offloaded}"),
        ("communication buffers", gib(static.buffers), "reduce_bucket_size"),
        (
            "activations",
            gib(batch.activations),
            f"saved, checkpointing {checkpointing}",
        ),
        ("one layer going back", gib(batch.work), f"attention {plan.planned.plan.attention}"),
        (
            "LM head and loss",
            gib(batch.logits),
            "a piece of logits and gradients, gone before layers go back",
        ),
        ("mask", gib(batch.mask), "dense" if plan.planned.plan.attention != "flex" else "sparse"),
        ("weights for evals", gib(plan.memory.evaluation), "while there are no activations"),
        ("peak", gib(plan.memory.peak), fits(plan)),
        ("host", gib(plan.memory.host_start + static.host), host),
    ]


def fits(plan: Plan) -> str:
    if plan.gpu.memory_gib is None:
        return "GPU memory unknown"
    if plan.gpu.name == CPU:
        return f"of {plan.gpu.memory_gib:.1f} GiB"
    reserve = plan.planned.plan.reserve_gib
    return f"of {plan.gpu.memory_gib:g} GiB, {reserve:g} of them reserved"


def cost_rows(plan: Plan) -> Rows:
    flops, planned = plan.flops, plan.planned
    share = flops.attention / flops.model
    rows: Rows = [
        ("FLOPs a step", f"{flops.model:.3e}", f"{share:.0%} attention; not counted: "
         f"{flops.recomputed:.1e} recomputed"),
    ]  # fmt: skip
    costs = ", ".join(f"{x:.2f} at coverage {c:g}" for c, x in plan.coverage_costs.items())
    rows.append(("over an AR step", f"{plan.step_over_ar:.2f}", f"FLOPs; {costs}"))
    if plan.duration is None:
        rows.append(("time", "unknown", "peak rate unknown"))
    else:
        assumed = f"assumes {planned.plan.mfu:.0%} MFU (plan.mfu), no evals, no waiting"
        rows += [
            ("seconds a step", f"{plan.duration.step_s:,.2f}", assumed),
            ("clean tokens a second", f"{plan.duration.tokens_per_second:,.0f}", "all GPUs"),
            ("days", f"{plan.duration.days:,.2f}", f"{plan.duration.gpu_hours:,.0f} GPU-hours"),
        ]
    disk = plan.checkpoint * plan.kept_checkpoints
    rows.append(
        ("checkpoint", gib(plan.checkpoint), f"up to {plan.kept_checkpoints} on disk: {gib(disk)}")
    )
    return rows


def gib(size: int) -> str:
    """Bytes as GiB, or MiB where that would be nothing."""
    return f"{size / GIB:,.1f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:,.1f} MiB"
