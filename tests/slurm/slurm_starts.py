"""What starts on Slurm take, and whether requeues lose or double a step.

    python -m tests.slurm.slurm_starts --folder /shared/try --sbatch=--partition=gpu

Takes minutes and is not part of `python -m bench`. Call it on a login node after `source
slurm/cluster.env`, with a folder that all nodes see; or where `python tests/private_slurm.py` has
started a Slurm on this host.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.results import RESULTS, ROOT, Outcome, write
from tidar_common.cli import telling_mistakes
from tidar_common.errors import UserError
from tidar_common.run_files import Exit

RUN = (
    "model=tiny", "model.hidden_size=32", "model.intermediate_size=64", "model.num_layers=1",
    "model.num_heads=1", "model.num_kv_heads=1", "global_batch_size=4", "micro_batch_size=2",
    "precision=fp32", "deepspeed=zero1", "wandb.mode=disabled", "evals.decode_speed.prompts=1",
    "evals.decode_speed.prompt_tokens=4", "evals.decode_speed.max_new_tokens=4",
    "evals.decode_speed.score_sequences=2",
)  # fmt: skip
STEPS = 5
MANY_STEPS = 100_000
"""More than are reached: the job is ended after its last requeue."""
START_S = 600
"""Longest wait for a step, the time in the queue included."""


@dataclass(frozen=True)
class Options:
    requeues: int = 10
    """Times that one job is asked to save and requeue itself."""
    nodes: int = 2


@dataclass(frozen=True)
class Jobs:
    """How jobs get to a Slurm: its environment, the folder of logs, and options of sbatch."""

    environment: dict[str, str]
    folder: Path
    options: tuple[str, ...] = ()

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True
        )

    def submit(self, *overrides: str) -> tuple[str, str]:
        """Check and submit a run as a user does; the job's number, and all that was printed."""
        done = self.run(
            "slurm/submit.sh", "--parsable", f"--output={self.folder}/job-%j.out",
            *self.options, *overrides,
        )  # fmt: skip
        if done.returncode:
            raise UserError(f"slurm/submit.sh: left with {done.returncode}: {done.stderr.strip()}")
        return done.stdout.split()[-1].partition(";")[0], done.stdout

    def log(self, job: str) -> str:
        path = self.folder / f"job-{job}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def fields(self, job: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str, until: Callable[[], bool], timeout_s: float = START_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not until():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {timeout_s} s:\n{self.log(job)}")
            time.sleep(0.25)


def steps_of(run_dir: Path) -> list[int]:
    """Steps of the complete lines of metrics.jsonl, in order."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line)["step"] for line in lines]


def events_of(path: Path, kind: str) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in path.read_text().splitlines()]
    return [event for event in events if event["event"] == kind]


def measure_start(jobs: Jobs, overrides: list[str], run_dir: Path, nodes: int) -> dict[str, Any]:
    """From the command to the first step of a run, with every check at its default."""
    run = [*overrides, f"run_dir={run_dir}", f"steps={STEPS}"]
    started = time.time()
    refused = jobs.run("slurm/submit.sh", *jobs.options, *run, "objective.alpa=1")
    refused_s = time.time() - started
    if refused.returncode != Exit.BAD_INPUT:
        raise UserError(f"a misspelt key was not refused: {refused.stdout}{refused.stderr}")
    started = time.time()
    cluster = [f"cluster.nodes={nodes}", "cluster.gpus_per_node=1"]
    planned = jobs.run(sys.executable, "-m", "pipeline.plan", *run, *cluster)
    plan_s = time.time() - started
    if planned.returncode:
        raise UserError(f"tidar-plan: {planned.stderr.strip()}")
    started = time.time()
    job, printed = jobs.submit(*run)
    submitted = time.time()
    jobs.wait(job, lambda: bool(steps_of(run_dir)))
    first_step = time.time()
    jobs.wait(job, lambda: "ended with" in jobs.log(job))
    jobs.wait(job, lambda: jobs.fields(job)["JobState"] == "COMPLETED", 60)
    (began,) = events_of(run_dir / "starts.jsonl", "start")
    (event,) = events_of(run_dir / "events.jsonl", "started")
    checked = printed.partition("checked in ")[2].partition(" s")[0]
    return {
        "seconds_until_a_misspelt_key_is_refused": round(refused_s, 1),
        "seconds_of_the_login_node_s_check": float(checked),
        "seconds_until_submit_sh_returns": round(submitted - started, 1),
        "seconds_of_the_plan_in_a_job_not_checked_before": round(plan_s, 1),
        "seconds_from_sbatch_to_the_script": round(began["time"] - submitted, 1),
        "seconds_from_sbatch_to_first_step": round(first_step - submitted, 1),
        "seconds_of_preflight": event["preflight_s"],
        "start_job": shown(jobs.fields(job)),
    }


def measure_requeues(
    jobs: Jobs, overrides: list[str], run_dir: Path, requeues: int
) -> dict[str, Any]:
    """One job asked `requeues` times to save: the steps that are missing, and those there twice."""
    job, _ = jobs.submit(*overrides, f"run_dir={run_dir}", f"steps={MANY_STEPS}")
    stops: list[int] = []
    for number in range(1, requeues + 1):
        reached = stops[-1] if stops else 0
        jobs.wait(job, lambda: len(steps_of(run_dir)) > reached)  # noqa: B023
        jobs.run("scancel", "--signal=USR1", job)
        jobs.wait(job, lambda: jobs.log(job).count("saved and requeued") == number)  # noqa: B023
        stops.append(steps_of(run_dir)[-1])
    jobs.wait(job, lambda: len(steps_of(run_dir)) > stops[-1])
    state = jobs.fields(job)
    jobs.run("scancel", job)
    jobs.wait(job, lambda: jobs.fields(job)["JobState"] not in ("RUNNING", "COMPLETING"), 120)
    steps = steps_of(run_dir)
    record = run_dir / "starts.jsonl"
    ends = [event["time"] for event in events_of(record, "end")]
    starts = [event["time"] for event in events_of(record, "start")][1:]
    log = jobs.log(job)
    continued = sum(f"continuing {run_dir} after step {step}\n" in log for step in stops)
    return {
        "requeues": int(state["Restarts"]),
        "continued_after_the_last_step": continued,
        "lost_steps": len(set(range(1, steps[-1] + 1)) - set(steps)),
        "doubled_steps": len(steps) - len(set(steps)),
        "stopped_after_step": stops,
        "seconds_between_end_and_next_start": [
            round(start - end, 1) for end, start in zip(ends, starts, strict=False)
        ],
        "requeued_job": shown(state),
    }


def shown(fields: dict[str, str]) -> str:
    """What scontrol says of a job, in its own words."""
    names = ("JobId", "JobState", "Restarts", "ExitCode", "NumNodes")
    return " ".join(f"{name}={fields[name]}" for name in names)


def prepare(folder: Path) -> Path:
    done = subprocess.run(
        [sys.executable, "-m", "data_prep.prepare", f"output_dir={folder}",
         "corpus.max_bytes=200000", "sequence_length=32", "tokenizer.vocab_size=400",
         "layout.block_size=4", "heldout_fraction=0.2"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise UserError(f"tidar-prepare: {done.stderr.strip()}")
    return folder


def measure(jobs: Jobs, options: Options) -> Outcome:
    overrides = [f"data.dir={prepare(jobs.folder / 'data')}", *RUN]
    version = jobs.run("sinfo", "--version").stdout.strip()
    outcome = Outcome(figures={"slurm": version, "nodes": options.nodes})
    outcome.figures |= measure_start(jobs, overrides, jobs.folder / "start", options.nodes)
    outcome.figures |= measure_requeues(jobs, overrides, jobs.folder / "requeues", options.requeues)
    outcome.figures["load_average_at_the_end"] = round(os.getloadavg()[0], 1)
    return outcome


def run(arguments: list[str] | None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.slurm.slurm_starts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--requeues", type=int, default=Options.requeues)
    parser.add_argument("--nodes", type=int, default=Options.nodes)
    parser.add_argument("--folder", type=Path, help="for data, runs and logs; new or empty")
    parser.add_argument("--sbatch", action="append", default=[], help="an option of sbatch")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the JSON file")
    given = parser.parse_args(arguments)
    if given.folder is None:
        raise UserError("--folder: has no value; give a new folder that all nodes see")
    if shutil.which("sbatch") is None:
        raise UserError("sbatch: not found; call this on a cluster's login node, or start a Slurm "
                        "here with python tests/private_slurm.py")  # fmt: skip
    options = Options(given.requeues, given.nodes)
    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "TIDAR_PYTHON": sys.executable, "TIDAR_LOGS": str(folder)}
    jobs = Jobs(environment, folder, (f"--nodes={options.nodes}", *given.sbatch))
    outcome = measure(jobs, options)
    path = write(
        "slurm_starts", torch.device("cpu"), given.results, "tests.slurm.slurm_starts",
        options=asdict(options), **asdict(outcome),
    )  # fmt: skip
    for key, value in outcome.figures.items():
        print(f"{key}: {value}")
    print(path)


@telling_mistakes
def main(arguments: list[str] | None = None) -> None:
    run(arguments)


if __name__ == "__main__":
    sys.exit(main())
