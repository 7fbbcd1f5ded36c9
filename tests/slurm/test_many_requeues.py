"""What starts take, and ten requeues of one job: no step is lost and none is there twice."""

import pytest
from slurm_starts import RUN, Jobs, measure_requeues, measure_start

REQUEUES = 10


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_ten_requeues_lose_and_double_no_step(prepared, submit, slurm, tmp_path):
    """By the benchmark's own measure; `python -m tests.slurm.slurm_starts` keeps the figures."""
    jobs = Jobs({**slurm.environment, **submit.environment}, tmp_path, ("--nodes=2",))
    overrides = [f"data.dir={prepared[0]}", *RUN]
    found = measure_requeues(jobs, overrides, tmp_path / "run", REQUEUES)
    assert (found["lost_steps"], found["doubled_steps"]) == (0, 0), found
    assert (found["requeues"], found["continued_after_the_last_step"]) == (REQUEUES, REQUEUES)
    assert found["requeued_job"].endswith("ExitCode=0:0 NumNodes=2")


@pytest.mark.long
def test_a_start_is_measured_from_the_command_to_the_first_step(prepared, submit, slurm, tmp_path):
    jobs = Jobs({**slurm.environment, **submit.environment}, tmp_path, ("--nodes=2",))
    overrides = [f"data.dir={prepared[0]}", *RUN]
    found = measure_start(jobs, overrides, tmp_path / "run", nodes=2)
    assert found["start_job"].endswith("JobState=COMPLETED Restarts=0 ExitCode=0:0 NumNodes=2")
    assert found["seconds_of_the_login_node_s_check"] < 10
    preflight, first_step = (
        found["seconds_of_preflight"], found["seconds_from_sbatch_to_first_step"],
    )  # fmt: skip
    assert 0 < preflight < first_step
