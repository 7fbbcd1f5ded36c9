"""`slurm/prepare.sbatch` tells each job of an array its share. Slurm itself is stood in for by the
variables that it sets."""

import os
import subprocess

import pytest
from commands import ROOT


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        ({}, ""),
        ({"ID": 0, "MIN": 0, "COUNT": 16, "STEP": 1}, "array=0/16 "),
        ({"ID": 8, "MIN": 4, "COUNT": 3, "STEP": 2}, "array=2/3 "),
        ({"ID": 7, "MIN": 7, "COUNT": 1, "STEP": 1}, "array=0/1 "),
    ],
)
def test_a_job_gets_its_share(tmp_path, array, expected):
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\necho "called: $*"\nexit 3\n')
    python.chmod(0o755)
    known = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    known |= {f"SLURM_ARRAY_TASK_{key}": str(value) for key, value in array.items()}
    known |= {"SLURM_JOB_ID": "5", "SLURMD_NODENAME": "n1", "SLURM_CPUS_PER_TASK": "4",
              "TIDAR_PYTHON": str(python)}  # fmt: skip
    done = subprocess.run(
        ["bash", "slurm/prepare.sbatch", "corpus=jsonl"], cwd=ROOT, env=known, text=True,
        capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 3, "the job ends as the preparation does"
    assert f"called: -m data_prep.prepare workers=4 {expected}corpus=jsonl\n" in done.stdout
