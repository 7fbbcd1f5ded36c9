"""Writes docs/plans/*.txt, what each shipped experiment takes, and the largest one on long
sequences: `python -m tools.plans`.

The figures are those of tidar-plan; a test compares the files with what it says today.
"""

from pathlib import Path

from hydra import compose, initialize_config_dir

from pipeline.planning.config import Planned
from pipeline.planning.plan import GIB, Plan, make_plan
from pipeline.planning.show import describe
from tidar_common.errors import UserError

ROOT = Path(__file__).resolve().parents[1]

FOLDER = ROOT / "docs" / "plans"
EXPERIMENTS = {
    "tidar_100m": ["plan.sequence_length=2048", "plan.vocab_size=32000"],
    "tidar_1p5b": ["plan.sequence_length=4096"],
    "tidar_8b": ["plan.sequence_length=4096"],
    "ablation": ["plan.sequence_length=4096"],
    "two_stage_1": ["plan.sequence_length=4096"],
    "two_stage_2": ["plan.sequence_length=4096"],
    "convert": ["model=smollm2_135m", "plan.sequence_length=2048", "plan.vocab_size=49153"],
}
LONG = "tidar_8b_32k"
"""Plans that are no experiments of their own: experiment, and overrides."""
VARIANTS = {LONG: ("tidar_8b", ["plan.sequence_length=32768", "global_batch_size=64"])}
GPUS = ("h100_80gb", "h200")
NODES = {"tidar_100m": (1,), "convert": (1,), "ablation": (1, 8), LONG: (1, 8)}
ALL_NODES = (1, 8, 32)
"""Of 8 GPUs each: 8, 64 and 256."""


def plan_of(overrides: list[str]) -> Plan:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return make_plan(Planned.from_config(compose("plan", overrides)))


def row(overrides: list[str], gpus: int, gpu: str) -> str:
    """One cluster's line: memory, time, and whether it can run."""
    try:
        plan = plan_of(overrides)
    except UserError as error:
        return f"{gpus:>5}  {gpu:<10}  {error}"
    assert plan.duration is not None
    assert plan.gpu.memory_gib is not None
    remark = "; ".join(plan.errors) or "fits"
    return (
        f"{gpus:>5}  {gpu:<10}  {plan.memory.peak / GIB:>6.1f}  {plan.gpu.memory_gib:>6.1f}  "
        f"{plan.duration.step_s:>8.2f}  {plan.duration.days:>8.2f}  "
        f"{plan.duration.gpu_hours:>9,.1f}  {remark}"
    )


def text(name: str) -> str:
    """A whole file: a line for each cluster, then all figures on the smallest."""
    experiment, overrides = VARIANTS.get(name) or (name, EXPERIMENTS[name])
    own = [f"experiment={experiment}", *overrides]
    lines = [
        f"Written by tools/plans.py; do not edit. $ tidar-plan {' '.join(own)} cluster.gpu=... "
        "cluster.nodes=...",
        "Time assumes 40 % MFU (plan.mfu), no evals, no waiting; memory is in GiB of a GPU.",
        "",
        " GPUs  kind        needed   there  s a step      days  GPU-hours",
    ]
    clusters = [(nodes, gpu) for gpu in GPUS for nodes in NODES.get(name, ALL_NODES)]
    if name == "tidar_100m":
        one = [*own, "cluster.nodes=1", "cluster.gpus_per_node=1"]
        lines += [row([*one, f"cluster.gpu={gpu}"], 1, gpu) for gpu in GPUS]
    for nodes, gpu in clusters:
        lines.append(row([*own, f"cluster.nodes={nodes}", f"cluster.gpu={gpu}"], 8 * nodes, gpu))
    shown = describe(plan_of([*own, f"cluster.gpu={GPUS[0]}"]))
    return "\n".join([*lines, "", f"On 8 {GPUS[0]}:", "", shown, ""])


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for experiment in (*EXPERIMENTS, *VARIANTS):
        (FOLDER / f"{experiment}.txt").write_text(text(experiment), encoding="utf-8")
