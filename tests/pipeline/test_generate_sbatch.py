"""`slurm/generate.sbatch` gives each job its share, each GPU a rank, and goes on at a time limit.
Slurm itself is stood in for by the variables that it sets, and by a `scontrol` that says its call.
"""

import os
import signal
import subprocess
from pathlib import Path

import pytest
from commands import ROOT
from private_slurm import wait_until

ARRAY = {
    "SLURM_ARRAY_TASK_ID": "8", "SLURM_ARRAY_TASK_MIN": "4", "SLURM_ARRAY_TASK_COUNT": "3",
    "SLURM_ARRAY_TASK_STEP": "2",
}  # fmt: skip
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node"


def job(folder: Path, body: str, **variables: str) -> subprocess.Popen[str]:
    """The script as a job, with `body` in place of Python."""
    called = f'echo "scontrol: $*"; touch {folder / "called"}'
    for name, text in (("python", body), ("scontrol", called)):
        program = folder / name
        program.write_text(f"#!/bin/bash\n{text}\n")
        program.chmod(0o755)
    known = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    known |= {"SLURM_JOB_ID": "5", "SLURMD_NODENAME": "n1", "TIDAR_PYTHON": str(folder / "python"),
              "PATH": f"{folder}:{known['PATH']}", **variables}  # fmt: skip
    return subprocess.Popen(
        ["bash", "slurm/generate.sbatch", "checkpoint=x y"], cwd=ROOT, env=known, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "-m pipeline.generate checkpoint=x y"),
        ({"SLURM_GPUS_ON_NODE": "8"}, f"{TORCHRUN}=8 -m pipeline.generate checkpoint=x y"),
        (
            {"SLURM_GPUS_ON_NODE": "8", "TIDAR_RANKS_PER_NODE": "1", **ARRAY},
            "-m pipeline.generate array=2/3 checkpoint=x y",
        ),
    ],
)  # fmt: skip
def test_a_job_gets_its_share_and_its_ranks(tmp_path, variables, expected):
    process = job(tmp_path, 'echo "called: $*"; exit 3', **variables)
    output, _ = process.communicate(timeout=60)
    assert f"called: {expected}\n" in output
    assert "job 5 ended with 3" in output
    assert process.returncode == 3, "the job ends as its work does"


def test_it_requeues_itself_and_works_on_until_slurm_ends_it(tmp_path):
    started, asked = tmp_path / "started", tmp_path / "asked"
    body = f'touch {started}; until [[ -e {asked} ]]; do sleep 0.05; done; echo "worked on"; exit 4'
    process = job(tmp_path, body)
    wait_until(started.exists, 60, str)
    process.send_signal(signal.SIGUSR1)  # to the script alone, as --signal=B: does
    wait_until((tmp_path / "called").exists, 60, str)
    asked.touch()
    output, _ = process.communicate(timeout=60)
    assert output.index("scontrol: requeue 5") < output.index("job 5 ended with 4")
    assert "worked on" in output
    assert "error" not in output
