"""Who may hold a run directory, and who waits for it."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from pipeline.training.launch import run_dir as module
from pipeline.training.launch.run_dir import LOCK, StillHeldError, owned
from tidar_common.errors import UserError

WORLD = SimpleNamespace(is_main=True, from_main=lambda value: value)
HOLD = """
import fcntl, json, os, sys, time
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
file.write(json.dumps({"host": "n1", "pid": 7, "started": "then", **json.loads(sys.argv[2])}))
file.flush()
print("held", flush=True)
time.sleep(float(sys.argv[3]))
"""


@pytest.fixture
def hold(tmp_path, monkeypatch):
    """Another process that holds the run directory for a while, with what it says of itself."""
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setattr(module, "POLL_S", 0.05)
    started = []

    def call(seconds: float, **about: str) -> None:
        arguments = [str(tmp_path / LOCK), json.dumps(about), str(seconds)]
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, *arguments], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"

    yield call
    for process in started:
        process.kill()
        process.communicate()


def test_a_rank_of_an_earlier_start_is_waited_for(hold, tmp_path):
    hold(0.5, slurm_job="12", slurm_start="0")
    said: list[str] = []
    with owned(tmp_path, {"steps": 3}, WORLD, said.append):
        assert (tmp_path / "config.yaml").read_text() == "steps: 3\n"
        holder = json.loads((tmp_path / LOCK).read_text())
    assert len(said) == 1
    assert "in use by process 7 on n1 since then, of an earlier start of this job" in said[0]
    assert (holder["slurm_job"], holder["slurm_start"]) == ("12", "1")


def test_one_that_does_not_end_is_no_mistake_of_the_user(hold, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "EARLIER_START_S", 0.2)
    hold(60, slurm_job="12", slurm_start="0")
    with pytest.raises(StillHeldError, match="process 7 on n1"), owned(
        tmp_path, {}, WORLD, lambda text: None
    ):  # fmt: skip
        pass


@pytest.mark.parametrize(
    "about", [{}, {"slurm_job": "11", "slurm_start": "0"}, {"slurm_job": "12", "slurm_start": "1"}]
)
def test_anybody_else_is_refused_at_once(hold, tmp_path, about):
    hold(60, **about)
    with pytest.raises(UserError, match="another run_dir"), owned(
        tmp_path, {}, WORLD, pytest.fail
    ):  # fmt: skip
        pass
