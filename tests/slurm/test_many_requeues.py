"""Ten requeues of one job: no step is lost and none is there twice."""

import pytest

from bench.slurm_starts import RUN, Jobs, measure_requeues

REQUEUES = 10


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_ten_requeues_lose_and_double_no_step(prepared, submit, slurm, tmp_path):
    """By the benchmark's own measure; `python -m bench.slurm_starts` keeps the figures."""
    jobs = Jobs({**slurm.environment, **submit.environment}, tmp_path, ("--nodes=2",))
    overrides = [f"data.dir={prepared[0]}", *RUN]
    found = measure_requeues(jobs, overrides, tmp_path / "run", REQUEUES)
    assert (found["lost_steps"], found["doubled_steps"]) == (0, 0), found
    assert (found["requeues"], found["continued_after_the_last_step"]) == (REQUEUES, REQUEUES)
    assert found["requeued_job"].endswith("ExitCode=0:0 NumNodes=2")
