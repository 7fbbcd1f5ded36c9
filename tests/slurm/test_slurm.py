"""The job scripts on a real Slurm of two nodes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from conftest import ROOT
from private_slurm import wait_until

STARTED_S = 90
"""Longest wait for a start of training: two nodes import torch and DeepSpeed on shared cores."""
TINY = (
    "model=tiny",
    "model.hidden_size=32",
    "model.intermediate_size=64",
    "model.num_layers=1",
    "model.num_heads=1",
    "model.num_kv_heads=1",
    "global_batch_size=4",
    "micro_batch_size=2",
    "precision=fp32",
    "deepspeed=zero1",
    "wandb.mode=disabled",
    "evals.decode_speed.prompts=1",
    "evals.decode_speed.prompt_tokens=4",
    "evals.decode_speed.max_new_tokens=4",
    "evals.decode_speed.score_sequences=2",
)


def overrides(data: Path, run_dir: Path, steps: int) -> list[str]:
    return [f"data.dir={data}", f"run_dir={run_dir}", f"steps={steps}", *TINY]


def steps_of(run_dir: Path) -> list[int]:
    """Steps of the complete lines of metrics.jsonl, in order."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = text.split("\n")[:-1]
    return [json.loads(line)["step"] for line in lines]


def test_prepare_uses_the_job_s_cpus(prepared):
    data, log = prepared
    assert (data / "manifest.json").is_file()
    assert "1 workers" in log
    assert "ended with 0" in log


def test_a_job_on_two_nodes_trains_to_the_end(prepared, submit, tmp_path):
    """Checked on this side first, by the command that the guide gives."""
    run_dir = tmp_path / "run"
    printed = submit.checked("--nodes=2", *overrides(prepared[0], run_dir, 4))
    assert "ready to submit" in printed
    job = printed.split()[-1]
    fields = submit.wait(job, 2 * STARTED_S)
    log = submit.log(job)
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == (
        "COMPLETED", "0:0", "0",
    ), log  # fmt: skip
    assert fields["NumNodes"] == "2"
    assert "2 nodes x 1 ranks (n[1-2])" in log
    assert steps_of(run_dir) == [1, 2, 3, 4]
    state = json.loads((run_dir / "checkpoints" / "step-00000004" / "state.json").read_text())
    assert state["world_size"] == 2
    assert (run_dir / "report.html").is_file()


def test_signals_save_and_requeue_and_no_step_is_lost_or_doubled(prepared, submit, slurm, tmp_path):
    """First as `scancel --signal` asks all tasks; then at one node's task alone, which is all that
    reaches a task where Slurm tracks processes by cgroups; last a rank that is killed, as for want
    of memory, which crashes the start and is retried."""
    run_dir, steps = tmp_path / "run", 120
    job = submit(
        "train.sbatch",
        *overrides(prepared[0], run_dir, steps),
        nodes=2,
        TIDAR_PLAN_CHECK="off",
        TIDAR_BACKOFF_S="1",
    )
    stops = []
    for ask in (
        lambda: slurm.run("scancel", "--signal=USR1", job),
        lambda: os.kill(node_process(job, b"slurm/node.sh"), signal.SIGUSR1),
    ):
        reached = stops[-1] if stops else 0
        wait_until(
            lambda: len(steps_of(run_dir)) >= reached + 2,  # noqa: B023
            STARTED_S,
            lambda: submit.log(job),
        )
        ask()
        wait_until(
            lambda: submit.log(job).count("saved and requeued") > len(stops),
            60,
            lambda: submit.log(job),
        )
        stops.append(steps_of(run_dir)[-1])
    assert stops[0] < stops[1] < steps, "a signal came too late to show anything"
    wait_until(lambda: len(steps_of(run_dir)) >= stops[1] + 2, STARTED_S, lambda: submit.log(job))
    os.kill(node_process(job, b"slurm/rank.py"), signal.SIGKILL)
    fields = submit.wait(job, 3 * STARTED_S)
    log = submit.log(job)
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == (
        "COMPLETED", "0:0", "3",
    ), log  # fmt: skip
    for step in stops:
        assert f"continuing {run_dir} after step {step}" in log
    assert steps_of(run_dir) == list(range(1, steps + 1))
    assert not (run_dir / "interrupted").exists()
    ends = [event for event in events(run_dir) if event["event"] == "end"]
    assert [(end["code"], end["failed_node"]) for end in ends if end["code"] in (0, 75)] == [
        (75, None), (75, None), (0, None),
    ]  # fmt: skip
    assert ends[2]["failed_node"] == "n2", log
    for start in range(4):
        logs = run_dir / "logs" / f"job-{job}" / f"start-{start}"
        assert "continuing" in (logs / "rank-0.out").read_text() or start == 0
        assert (logs / "rank-1.err").exists()


def node_process(job: str, script: bytes) -> int:
    """Process id of the second node's `script` of a job."""
    for folder in Path("/proc").iterdir():
        try:
            command = (folder / "cmdline").read_bytes()
            environment = (folder / "environ").read_bytes().split(b"\0")
        except (OSError, ValueError):
            continue
        own = {b"SLURM_JOB_ID=" + job.encode(), b"SLURM_NODEID=1"}
        started = [word for word in command.split(b"\0")[1:3] if word == script]
        # torchrun has the ranks' script among its arguments as well, further on.
        if started and own <= set(environment):
            return int(folder.name)
    raise AssertionError(f"no {script!r} of job {job} on the second node")


def test_a_bad_override_ends_the_job_at_once_with_one_line(prepared, submit, tmp_path):
    started = time.monotonic()
    run_dir = tmp_path / "run"
    job = submit("train.sbatch", *overrides(prepared[0], run_dir, 4), "objective.alpa=1", nodes=2)
    fields = submit.wait(job, 60)
    log = submit.log(job)
    assert (fields["JobState"], fields["ExitCode"]) == ("FAILED", "2:0"), log
    errors = [line for line in log.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert "objective.alpa" in errors[0]
    assert "Traceback" not in log
    assert not run_dir.exists()
    assert time.monotonic() - started < 45


def test_a_misspelt_key_is_refused_on_the_login_node_in_seconds(prepared, submit, slurm, tmp_path):
    started = time.monotonic()
    known = slurm.run("squeue", "-h")
    done = subprocess.run(
        [ROOT / "slurm" / "submit.sh", "--nodes=2",
         *overrides(prepared[0], tmp_path / "run", 4), "objective.alpa=1"],
        env={**slurm.environment, **submit.environment}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout
    assert done.stderr == "error: objective.alpa: unknown key; did you mean objective.alpha?\n"
    assert slurm.run("squeue", "-h") == known, "nothing was submitted"
    assert not (tmp_path / "run").exists()
    assert time.monotonic() - started < 30, "10 s on a machine with nothing else to do"


def test_the_exit_code_of_a_rank_is_the_job_s(prepared, submit, tmp_path):
    """Past the check before the start: a run directory that cannot be one."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    job = submit(
        "train.sbatch",
        *overrides(prepared[0], blocked / "run", 4),
        nodes=1,
        TIDAR_PLAN_CHECK="off",
    )
    fields = submit.wait(job, STARTED_S)
    log = submit.log(job)
    assert (fields["JobState"], fields["ExitCode"]) == ("FAILED", "2:0"), log
    assert "error: run_dir: " in log


def test_a_crash_loop_stops_at_the_limit_and_leaves_a_bad_node(prepared, submit, slurm, tmp_path):
    """A launcher that dies at once: two starts on the first node, then one on the other."""
    run_dir, crashing = tmp_path / "run", tmp_path / "python"
    crashing.write_text(
        f"""#!/bin/bash\nif [[ "$2" == torch.distributed.run ]]; then exit 7; fi\n"""
        f"""exec {sys.executable} "$@"\n"""
    )
    crashing.chmod(0o755)
    job = submit(
        "train.sbatch",
        *overrides(prepared[0], run_dir, 4),
        nodes=1,
        TIDAR_PYTHON=str(crashing),
        TIDAR_PLAN_CHECK="off",
        TIDAR_MAX_CRASHES="2",
        TIDAR_BACKOFF_S="4",
    )
    fields = submit.wait(job, 120)
    log = submit.log(job)
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == (
        "FAILED", "7:0", "2",
    ), log  # fmt: skip
    assert fields["ExcNodeList"] == "n1"
    starts = [event for event in events(run_dir) if event["event"] == "start"]
    ends = [event for event in events(run_dir) if event["event"] == "end"]
    assert [start["nodes"] for start in starts] == ["n1", "n1", "n2"]
    assert [end["failed_node"] for end in ends] == ["n1", "n1", "n2"]
    assert [end["requeued"] for end in ends] == [True, True, False]
    waits = [start["time"] - end["time"] for end, start in zip(ends, starts[1:], strict=False)]
    assert waits[1] > 8 - 1.5, "the second wait is twice the first; Slurm counts whole seconds"
    assert "error: crashed 3 times without a new checkpoint" in log


def test_a_sweep_is_an_array_with_a_run_for_each_task(prepared, submit, slurm, tmp_path):
    job = submit(
        "train.sbatch",
        *overrides(prepared[0], tmp_path / "sweep", 2),
        "objective.alpha=0.3,1",
        nodes=1,
        SBATCH_ARRAY_INX="0-1",
        TIDAR_PLAN_CHECK="off",
    )

    def logs() -> str:
        return "\n".join(path.read_text() for path in submit.folder.glob("job-*.out"))

    wait_until(lambda: not slurm.run("squeue", "-h", "-j", job, check=False), STARTED_S, logs)
    states = re.findall(r"JobState=(\w+)", slurm.run("scontrol", "-o", "show", "job", job))
    assert states == ["COMPLETED", "COMPLETED"], logs()
    for alpha in (0.3, 1):
        run_dir = tmp_path / "sweep" / f"objective.alpha-{alpha}"
        assert steps_of(run_dir) == [1, 2]
        assert f"alpha: {alpha}\n" in (run_dir / "config.yaml").read_text()


def events(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "starts.jsonl").read_text().splitlines()]


def test_a_folder_that_is_not_the_checkout_is_refused(submit, slurm, tmp_path):
    output = slurm.run(
        "sbatch", "--parsable", f"--chdir={tmp_path}", f"--output={tmp_path}/job-%j.out",
        str(Path(__file__).parents[2] / "slurm" / "evaluate.sbatch"),
    )  # fmt: skip
    fields = submit.wait(output.strip(), 30)
    assert fields["JobState"] == "FAILED"
    assert fields["ExitCode"] != "0:0"
