"""Ten requeues of one job: no step is lost, none is there twice, and what a start costs."""

import json
import os
import time
from pathlib import Path

import pytest
from cluster import wait_until
from test_slurm import STARTED_S, events, overrides, steps_of

REQUEUES = 10
STEPS = 100_000
"""More than are reached: the job is ended after its last requeue."""


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_ten_requeues_lose_and_double_no_step(prepared, submit, slurm, tmp_path):
    """`REQUEUES_JSON` in the environment names a file for the figures."""
    run_dir = tmp_path / "run"
    submitted = time.time()
    job = submit(
        "train.sbatch", *overrides(prepared[0], run_dir, STEPS), nodes=2, TIDAR_PLAN_CHECK="off"
    )
    first_step_s, stops = None, []
    for number in range(1, REQUEUES + 1):
        reached = stops[-1] if stops else 0
        wait_until(
            lambda: len(steps_of(run_dir)) > reached,  # noqa: B023
            STARTED_S,
            lambda: submit.log(job),
        )
        first_step_s = first_step_s or time.time() - submitted
        slurm.run("scancel", "--signal=USR1", job)
        wait_until(
            lambda: submit.log(job).count("saved and requeued") == number,  # noqa: B023
            60,
            lambda: submit.log(job),
        )
        stops.append(steps_of(run_dir)[-1])
    wait_until(lambda: len(steps_of(run_dir)) > stops[-1], STARTED_S, lambda: submit.log(job))
    state = slurm.job(job)
    slurm.run("scancel", job)
    submit.wait(job, 60)
    steps = steps_of(run_dir)
    lost = len(set(range(1, steps[-1] + 1)) - set(steps))
    doubled = len(steps) - len(set(steps))
    continued = [f"continuing {run_dir} after step {step}" in submit.log(job) for step in stops]
    ends = [event["time"] for event in events(run_dir) if event["event"] == "end"]
    starts = [event["time"] for event in events(run_dir) if event["event"] == "start"][1:]
    waits = [round(start - end, 2) for end, start in zip(ends, starts, strict=False)]
    figures = {
        "slurm": slurm.run("sinfo", "--version").strip(),
        "nodes": 2,
        "job_state": state["JobState"],
        "restarts": int(state["Restarts"]),
        "lost_steps": lost,
        "doubled_steps": doubled,
        "stopped_after_step": stops,
        "seconds_from_sbatch_to_first_step": round(first_step_s or 0.0, 1),
        "seconds_between_end_and_next_start": waits,
        "load_average": round(os.getloadavg()[0], 1),
    }
    if "REQUEUES_JSON" in os.environ:
        Path(os.environ["REQUEUES_JSON"]).write_text(json.dumps(figures, indent=2) + "\n")
    assert (lost, doubled, state["Restarts"]) == (0, 0, str(REQUEUES)), figures
    assert all(continued)
