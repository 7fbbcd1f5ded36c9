"""A time limit that is reached, a step that is cancelled, and ranks that Slurm starts itself."""

import json
import sys
from pathlib import Path

from private_slurm import wait_until
from test_slurm import STARTED_S, events, overrides, steps_of

SLOW_RANK = Path(__file__).with_name("slow_rank.py")
STEPS = 150
STEP_S = 0.4
"""Least seconds of a step of the first start: the limit comes before the last of them."""


def test_a_job_at_its_time_limit_saves_requeues_and_completes(prepared, submit, slurm, tmp_path):
    """And one whose step is cancelled goes on from what was saved.

    One node, two tasks. Slurm looks at limits twice a minute, so the signal comes after 30 to 60 of
    the 120 seconds. The next starts have no limit: a slow machine would need many.
    """
    run_dir, slow = tmp_path / "run", tmp_path / "python"
    slow.write_text(
        f"""#!/bin/bash\nif [[ "$1" == slurm/rank.py ]]; then set -- {SLOW_RANK} "${{@:2}}"; fi\n"""
        f"""exec {sys.executable} "$@"\n"""
    )
    slow.chmod(0o755)
    job = submit(
        "train.sbatch",
        *overrides(prepared[0], run_dir, STEPS),
        "stop_before=null",  # which would be ahead of the signal
        options=("--ntasks-per-node=2", "--time=2", "--signal=USR1@60"),
        TIDAR_PYTHON=str(slow),
        TIDAR_PLAN_CHECK="off",
        TIDAR_BACKOFF_S="1",
        TIDAR_TEST_STEP_S=str(STEP_S),
    )
    wait_until(lambda: "saved and requeued" in submit.log(job), STARTED_S, lambda: submit.log(job))
    reached = max(steps_of(run_dir), default=0)
    assert reached < STEPS
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=UNLIMITED")
    wait_until(
        lambda: max(steps_of(run_dir), default=0) > reached, STARTED_S, lambda: submit.log(job)
    )
    slurm.run("scancel", f"{job}.0")  # which kills at once
    fields = submit.wait(job, 3 * STARTED_S)
    log = submit.log(job)
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == (
        "COMPLETED", "0:0", "2",
    ), log  # fmt: skip
    assert "1 nodes x 2 ranks (n1)" in log
    assert f"stopped (SIGUSR1) after step {reached} and saved" in log
    assert not reached or log.count(f"[rank 0] continuing {run_dir} after step {reached}") == 2
    assert f"[rank 0] done: {run_dir} has {STEPS} steps" in log, "the last line is not lost"
    assert steps_of(run_dir) == list(range(1, STEPS + 1))
    codes = [event["code"] for event in events(run_dir) if event["event"] == "end"]
    assert (codes[0], codes[1] in (0, 75), codes[2]) == (75, False, 0), codes
    state = json.loads((run_dir / f"checkpoints/step-{STEPS:08}/state.json").read_text())
    assert state["world_size"] == 2
    for start in range(3):
        for rank in range(2):
            assert (run_dir / "logs" / f"job-{job}/start-{start}/rank-{rank}.err").is_file()
