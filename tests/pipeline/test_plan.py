"""tidar-plan as its user runs it, and its figures against the run that is then started."""

import json
import random
import subprocess
import sys

import pytest
from commands import ROOT, SMALL_RUN, run
from omegaconf import DictConfig

from pipeline.checkpoint.retention import steps_to_keep
from pipeline.plan import plan
from pipeline.planning.config import Planned
from pipeline.planning.plan import GIB, Plan, make_plan
from pipeline.planning.show import describe
from tidar_common.cli import run as run_task

BIG = ("experiment=tidar_8b", "plan.sequence_length=4096", "cluster.gpu=h100_80gb")
EXPERIMENTS = sorted((ROOT / "conf" / "experiment").glob("*.yaml"))
LENGTHS = ("plan.sequence_length=64", "plan.vocab_size=400", "layout.block_size=4")
SHORT = ("model=tiny", *LENGTHS)


@pytest.fixture
def planning(monkeypatch, capsys):
    """Runs tidar-plan in this process; returns exit code, stdout and stderr."""

    def call(*overrides: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tidar-plan", *overrides])
        code = run_task("plan", plan)
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def planned(monkeypatch):
    """The plan of some overrides, without printing."""

    def call(*overrides: str) -> Plan:
        plans = []
        monkeypatch.setattr(sys, "argv", ["tidar-plan", *overrides])
        code = run_task("plan", lambda cfg: plans.append(make_plan(Planned.from_config(cfg))))
        assert code == 0
        return plans[0]

    return call


def test_a_plan_agrees_with_the_run(data_dir, trained_run, tmp_path):
    """Parameters, sections and tokens of the plan are those of the run on the same data, and its
    checkpoint has about the size on disk that was planned."""
    file = tmp_path / "plan.json"
    done = run("pipeline.plan", f"data.dir={data_dir}", *SMALL_RUN, "cluster.gpus_per_node=2",
               "cluster.nodes=1", f"plan.json={file}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text())
    assert figures["accumulation_steps"] == 2
    assert (figures["sequence_length"], figures["mask_slots"]) == (64, 64)
    last = [json.loads(line) for line in (trained_run / "metrics.jsonl").open()][-1]
    planned_tokens = figures["clean_tokens_per_step"] * last["step"]
    assert 0.98 * planned_tokens < last["tokens"] <= planned_tokens
    folder = trained_run / "checkpoints" / f"step-{last['step']:08d}"
    model = json.loads((folder / "model.json").read_text())
    assert model["vocab_size"] == 400
    states = sum(path.stat().st_size for path in folder.glob("*.pt"))
    assert states == pytest.approx(figures["checkpoint"], rel=0.2)


def test_it_starts_without_deepspeed_or_process_groups():
    code = (
        "import sys, pipeline.plan\n"
        "assert 'deepspeed' not in sys.modules and 'wandb' not in sys.modules\n"
        "import torch.distributed as d\n"
        "assert not d.is_initialized()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_published_settings_give_the_published_sizes(planned):
    small = planned("experiment=tidar_1p5b", "plan.sequence_length=4096")
    assert small.planned.model.num_parameters == 1_543_714_304
    assert small.tokens_per_step == 2**21
    big = planned("experiment=tidar_8b", "plan.sequence_length=4096")
    assert big.planned.model.num_parameters == 8_190_735_360
    steps = big.planned.train.steps
    assert steps * big.tokens_per_step == pytest.approx(150e9, rel=1e-4)


def test_what_does_not_fit_is_refused_with_the_knob_to_turn(planning):
    code, out, error = planning(*BIG, "deepspeed=zero1")
    assert code == 2
    assert error.startswith("error: memory: ")
    assert error.count("\n") == 1
    assert "deepspeed=zero2" in error
    assert "optimizer states" in out, "the figures come before the refusal"
    assert planning(*BIG, "cluster.nodes=4")[0] == 0


@pytest.mark.parametrize("overrides", [
    ("deepspeed=zero0",),
    ("deepspeed=zero3", "micro_batch_size=8"),
    ("deepspeed=zero3", "micro_batch_size=4", "activation_checkpointing=none"),
    ("deepspeed=zero2", "cluster.gpu=a100_40gb"),
])  # fmt: skip
def test_each_remedy_takes_less_memory(planned, overrides):
    """Doing what the message says, again and again, ends at a plan that fits."""
    overrides = (*BIG, *overrides)
    peak = float("inf")
    for _ in range(10):
        result = planned(*overrides)
        assert result.memory.peak < peak
        peak = result.memory.peak
        if not result.errors:
            return
        remedy = result.errors[0].split("; try ")[1].split(",")[0]
        assert "=" in remedy, f"no knob left at {peak / GIB:.0f} GiB"
        overrides = (*overrides, remedy)
    raise AssertionError("never fits")


@pytest.mark.parametrize("seed", range(30))
def test_checkpoints_on_disk_are_at_most_those_planned(planned, seed):
    """Beside a run that is played through with what retention keeps; the best may be any."""
    rng = random.Random(seed)
    steps, every = rng.randint(1, 60), rng.randint(1, 9)
    keep_last, keep_every = rng.randint(0, 3), rng.choice((0, 2, 5, 6))
    result = planned(
        *SHORT, f"steps={steps}", f"checkpoint.every={every}", f"checkpoint.keep_last={keep_last}",
        f"checkpoint.keep_every={keep_every}", f"checkpoint.keep_best={seed % 2 == 0}",
    )  # fmt: skip
    config = result.planned.train.checkpoint
    losses = {step: rng.random() for step in range(steps + 1)}
    stored, most = set(), 0
    for step in range(1, steps + 1):
        if step % every == 0 or step == steps:
            stored.add(step)
            most = max(most, len(stored))
            stored = steps_to_keep(stored, config, losses)
    assert most <= result.kept_checkpoints <= most + keep_last + 2


def test_a_batch_that_does_not_divide_is_refused(planning):
    code, _, error = planning(*SHORT, "global_batch_size=33")
    assert code == 2
    assert "try global_batch_size=64" in error


@pytest.mark.parametrize(("overrides", "names"), [
    ((), "plan.sequence_length"),
    (LENGTHS, "model.hidden_size"),
    (("model=tiny", "plan.sequence_length=64"), "plan.vocab_size"),
    (SHORT[:-1], "layout.block_size"),
    ((*SHORT, "cluster.nodes=0"), "cluster: nodes"),
    ((*SHORT, "cluster.gpus=8"), "cluster.gpus"),
    ((*SHORT, "plan.mfu=2"), "plan: mfu"),
    ((*SHORT, "plan.attention=flash"), "plan: attention"),
    ((*SHORT, "model.max_positions=32"), "model.max_positions"),
    ((*SHORT, "layout.block_size=65"), "layout.block_size"),
    ((*SHORT, "check=perhaps"), "check"),
    ((*SHORT, "data.dir=/not/there"), "data.dir"),
    ((*SHORT, "precision=fp8"), "precision"),
    ((*SHORT, "plan.json=/proc/none/plan.json"), "plan.json"),
])  # fmt: skip
def test_mistakes_are_named_on_one_line(planning, overrides, names):
    code, _, error = planning(*overrides)
    assert code == 2
    assert error.startswith("error: ")
    assert names in error
    assert error.count("\n") == 1


def test_lengths_beside_data_are_refused(planning, data_dir):
    code, _, error = planning(f"data.dir={data_dir}", "plan.sequence_length=64")
    assert code == 2
    assert "plan.sequence_length" in error


def test_unknown_hardware_is_reported_as_unknown(planning, planned):
    code, out, _ = planning(*SHORT, "cluster.gpu=tpu_v9")
    assert code == 0
    assert "tpu_v9: unknown hardware" in out
    assert "peak rate unknown" in out
    result = planned(*SHORT, "cluster.gpu=tpu_v9")
    assert result.duration is None
    stated = planned(*SHORT, "cluster.gpu=tpu_v9", "cluster.memory_gib=0.001", "cluster.tflops=100")
    assert stated.duration is not None
    assert stated.errors


def test_time_follows_from_flops_and_the_assumption(planned):
    at_40 = planned(*BIG, "cluster.nodes=4")
    at_20 = planned(*BIG, "cluster.nodes=4", "plan.mfu=0.2")
    assert at_40.duration.step_s == pytest.approx(at_40.flops.model / (0.4 * 989e12 * 32))
    assert at_20.duration.days == pytest.approx(2 * at_40.duration.days)
    # The twin has half the rows; a mask section sees about as much again as the clean one.
    twin = planned(*BIG, "cluster.nodes=4", "objective=ar")
    assert twin.planned.num_slots == 0
    assert at_40.flops.weights == 2 * twin.flops.weights
    assert at_40.flops.attention == pytest.approx(2 * twin.flops.attention, rel=0.01)
    assert at_40.coverage_costs[1.0] == pytest.approx(2, rel=0.01)
    assert 1.2 < at_40.coverage_costs[0.25] < 1.3


def test_offloading_moves_optimizer_states_to_the_host(planned):
    here = planned(*BIG)
    there = planned(*BIG, "deepspeed.offload_optimizer=true")
    assert there.memory.static.host == here.memory.static.optimizer
    assert there.memory.static.optimizer == 0
    both = planned(*BIG, "deepspeed.offload_optimizer=true", "deepspeed.offload_parameters=true")
    assert both.memory.static.weights == 0
    assert both.memory.static.host == there.memory.static.host + there.memory.static.weights
    assert both.memory.static.total < there.memory.static.total


def test_it_reads_well(planned):
    lines = describe(planned(*BIG, "cluster.nodes=4")).splitlines()
    assert any("assumes 40% MFU" in line and "seconds a step" in line for line in lines)
    assert [n for n in lines if n[0] not in " n"] == ["run", "memory per GPU", "time and disk"]


@pytest.mark.parametrize("name", [path.stem for path in EXPERIMENTS])
def test_every_shipped_experiment_has_a_plan(planned, name):
    shape = ("model=smollm2_135m",) if name == "convert" else ()
    result = planned(f"experiment={name}", *LENGTHS, *shape, "cluster.gpus_per_node=1")
    assert result.memory.peak > 0


def test_every_key_of_training_is_one_of_the_plan_s(monkeypatch):
    keys = {}
    for name in ("train", "plan"):
        monkeypatch.setattr(sys, "argv", [name])
        run_task(name, lambda cfg, name=name: keys.update({name: flat(cfg)}))
    assert keys["train"] < keys["plan"]
    added = keys["plan"] - keys["train"]
    assert {key.split(".")[0] for key in added} == {"check", "cluster", "plan"}


def flat(cfg: DictConfig, prefix: str = "") -> set[str]:
    """The dotted names of all keys."""
    names = set()
    for key in cfg:
        value = cfg._get_node(key)
        group = isinstance(value, DictConfig) and not value._is_none()
        names |= flat(value, f"{prefix}{key}.") if group else {f"{prefix}{key}"}
    return names


def test_plans_in_the_cluster_guide_are_what_is_printed(planning):
    blocks = (ROOT / "docs" / "cluster.md").read_text().split("```text\n$ tidar-plan ")[1:]
    assert blocks
    for block in blocks:
        command, _, shown = block.partition("```")[0].partition("\n")
        _, out, error = planning(*command.split())
        if shown.startswith("...\n"):
            assert shown == "...\n" + error
        else:
            assert shown == out + error
