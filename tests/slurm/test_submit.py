"""slurm/submit.sh: what it understands of a command line, without a Slurm."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT, SMALL_RUN

PLAN = """#!/usr/bin/env bash
if [[ "$2" == pipeline.plan ]]; then printf '%s\\n' plan "${@:3}"; exit; fi
exec PYTHON "$@"
"""
"""Stands for Python: the plan is what is asked of it, all else is itself."""
SBATCH = """#!/usr/bin/env bash
printf '%s\\n' sbatch "$@" "TIDAR_PLAN_CHECK=$TIDAR_PLAN_CHECK"
"""


def submit(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(ROOT / "slurm" / "submit.sh"), *arguments], cwd=cwd,
        env={"PATH": "/usr/bin:/bin", "TIDAR_PYTHON": sys.executable, "OMP_NUM_THREADS": "1",
             "TIDAR_CLUSTER_ENV": str(ROOT / "slurm" / "cluster.env.example"), **environment},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip


@pytest.fixture
def asked(tmp_path):
    """Submits from `tmp_path`; returns what was asked of the plan and of sbatch, and stderr."""
    for name, text in (("python", PLAN), ("sbatch", SBATCH)):
        file = tmp_path / name
        file.write_text(text.replace("PYTHON", sys.executable))
        file.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}/usr/bin:/bin"

    def call(*arguments: str, **environment: str) -> tuple[list[str], list[str], str]:
        done = submit(*arguments, cwd=tmp_path, TIDAR_PYTHON=str(tmp_path / "python"), PATH=path,
                      **environment)  # fmt: skip
        assert done.returncode == 0, done.stderr
        plan, _, sbatch = done.stdout.partition("sbatch\n")
        return plan.split("\n"), sbatch.split("\n"), done.stderr

    return call


def test_it_prints_plan_command_and_script_without_submitting(data_dir, tmp_path):
    done = submit(
        "--dry-run", "--nodes=2", "--gpus-per-node=h100:2", "--exclusive", f"data.dir={data_dir}",
        f"run_dir={tmp_path / 'run'}", *SMALL_RUN,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "8 sequences = 2 x 1 accumulation steps x 4 processes" in done.stdout
    assert (
        "would submit: 'sbatch' '--nodes=2' '--gpus-per-node=h100:2' '--exclusive'" in done.stdout
    )
    assert "FLOPs a step" in done.stdout
    assert "#SBATCH --job-name=tidar-train" in done.stdout


@pytest.mark.parametrize(
    ("options", "nodes", "ranks", "gpu"),
    [
        ("--nodes 2 --partition gpu --gpus-per-node 8", 2, 8, "unknown"),
        ("-N 2 -p gpu --gpus=h100:16", 2, 8, "unknown"),
        ("-N2 -G 4", 2, 2, "unknown"),
        ("--gres=gpu", 1, 1, "unknown"),
        ("--gres gpu:4 --mem 8G", 1, 4, "unknown"),
        ("--gres=gpu:h100:4,shard:2,gpu:a100:2", 1, 6, "unknown"),
        ("--gres=craynetwork:2", 1, 1, "cpu"),
        ("--tres-per-node=gres/gpu:h100:4", 1, 4, "unknown"),
        ("--ntasks-per-node 4", 1, 4, "cpu"),
        ("--exclusive", 1, 1, "cpu"),
    ],
)
def test_slurm_s_ways_of_saying_nodes_and_gpus(asked, options, nodes, ranks, gpu):
    plan, sbatch, _ = asked(*options.split(), "steps=3")
    assert sbatch[:-3] == [*options.split(), "slurm/train.sbatch"]
    assert sbatch[-3:] == ["steps=3", "TIDAR_PLAN_CHECK=off", ""]
    assert plan == [
        "plan", "check=true", "steps=3", f"cluster.nodes={nodes}",
        f"cluster.gpus_per_node={ranks}", f"cluster.gpu={gpu}", "",
    ]  # fmt: skip


def test_slurm_s_variables_count_as_its_options(asked):
    plan, _, _ = asked("steps=3", SBATCH_GRES="gpu:4", TIDAR_GPU="h200")
    assert plan[-4:-1] == ["cluster.nodes=1", "cluster.gpus_per_node=4", "cluster.gpu=h200"]
    plan, _, _ = asked("--gpus-per-node=8", "steps=3", TIDAR_RANKS_PER_NODE="2")
    assert "cluster.gpus_per_node=2" in plan


def test_relative_paths_mean_from_where_it_was_typed(asked, tmp_path):
    words = ["run_dir=runs/x", "data.dir=/data/a", "init_from=https://host/a"]
    more = ["--config-dir", "mine", "cluster.memory_gib=8", "model=tiny,small"]
    plan, sbatch, _ = asked(*words, *more)
    first = plan.index("check=true")
    assert plan[first + 1 : first + 6] == [
        "data.dir=/data/a", "init_from=https://host/a", f"--config-dir={tmp_path}/mine",
        "model=tiny", f"run_dir={tmp_path}/runs/x/model-tiny",
    ]  # fmt: skip
    assert plan[-2] == "cluster.memory_gib=8"
    assert sbatch[:4] == [
        "--array=0-1", "slurm/train.sbatch", f"run_dir={tmp_path}/runs/x", "data.dir=/data/a",
    ]  # fmt: skip
    assert not any("cluster." in word for word in sbatch)


def test_ranks_without_cpus_are_worth_a_note(asked):
    assert "give the 8 ranks of a node one CPU" in asked("--gpus-per-node=8", "steps=3")[2]
    for options in (("-c", "64"), ("--exclusive",), ("--cpus-per-gpu=8",)):
        assert asked("--gpus-per-node=8", *options, "steps=3")[2] == ""
    assert asked("steps=3")[2] == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nodes=1-2"], "one number each"),
        (["--gpus-per-node=h100"], "one number each"),
        (["--nodes=2", "--gpus=7"], "not the same number on each of 2 nodes"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments, said):
    done = submit(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr


def test_the_cluster_s_own_settings_are_read_from_where_they_are(asked, tmp_path):
    settings = tmp_path / "mine.env"
    example = (ROOT / "slurm" / "cluster.env.example").read_text()
    settings.write_text(example + "export TIDAR_GPU=b200\n")
    assert "cluster.gpu=b200" in asked("steps=3", TIDAR_CLUSTER_ENV=str(settings))[0]
    done = submit("steps=3", TIDAR_CLUSTER_ENV="/not/there")
    assert done.returncode == 2
    assert "TIDAR_CLUSTER_ENV: /not/there is not there" in done.stderr
