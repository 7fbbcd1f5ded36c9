"""What follows a start: the rules of slurm/restart.py, without a Slurm."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "slurm" / "restart.py"


@pytest.fixture(scope="module")
def restart():
    spec = importlib.util.spec_from_file_location("restart", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["restart"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["restart"]


def end(code: int, checkpoint: str | None = None, node: str | None = None, job: str = "1") -> dict:
    return {"code": code, "checkpoint": checkpoint, "failed_node": node, "job": job}


def lines(restart, *ends: dict) -> str:
    return restart.decide(list(ends), max_crashes=2, backoff_s=60).line()


def test_saved_runs_are_requeued_for_ever_and_at_once(restart):
    assert lines(restart, *[end(75)] * 500) == "requeue 0 -"


@pytest.mark.parametrize("code", [0, 2, 3])
def test_what_would_only_recur_is_not_repeated(restart, code):
    assert lines(restart, end(code)) == "stop 0 -"


def test_crashes_wait_longer_each_time_up_to_the_limit(restart):
    assert lines(restart, end(1)) == "requeue 60 -"
    assert lines(restart, end(1), end(137)) == "requeue 120 -"
    assert lines(restart, end(1), end(1), end(1)) == "stop 0 -"
    many = restart.decide([end(1)] * 12, max_crashes=99, backoff_s=60)
    assert many.delay_s == 3600


def test_a_new_checkpoint_starts_the_count_anew(restart):
    assert lines(restart, end(1), end(1), end(1, "step-2")) == "requeue 60 -"
    # Requeued in between without a new checkpoint: still the same loop.
    assert lines(restart, end(1), end(75), end(1), end(1)) == "stop 0 -"


def test_somebody_who_submits_again_has_all_retries(restart):
    assert lines(restart, *[end(1)] * 3, end(1, job="2")) == "requeue 60 -"


def test_a_node_that_failed_twice_in_a_job_is_excluded(restart):
    rows = [end(1, "a", "n1"), end(1, "b", "n2"), end(1, "c", "n1")]
    assert lines(restart, *rows) == "requeue 60 n1"
    assert lines(restart, *rows, end(75)) == "requeue 0 n1"
    assert lines(restart, *rows, end(1, "d", "n2", job="2")) == "requeue 60 -"


def test_the_node_of_a_killed_rank_is_blamed_before_those_that_raised(restart, tmp_path):
    assert restart.failed_node(tmp_path) is None
    (tmp_path / "failed-n2@0").write_text("raised 10.5\n")
    (tmp_path / "failed-n3@0").write_text("raised 10.25\n")
    assert restart.failed_node(tmp_path) == "n3"
    (tmp_path / "failed-n1@0").write_text("killed 11.0\n")
    assert restart.failed_node(tmp_path) == "n1"


def test_the_record_survives_half_a_line(restart, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    (tmp_path / "starts.jsonl").write_text('{"event": "end", "cod\n')
    (tmp_path / "checkpoints" / "step-00000004").mkdir(parents=True)
    (tmp_path / "checkpoints" / "latest").write_text("step-00000004\n")
    restart.main(["start", str(tmp_path)])
    restart.main(["end", str(tmp_path), "1", str(tmp_path)])
    out, err = capsys.readouterr()
    assert out == "requeue 60 -\n"
    assert "crash 1 without a new checkpoint" in err
    rows = [json.loads(line) for line in (tmp_path / "starts.jsonl").open() if line.endswith("}\n")]
    assert [(row["event"], row["job"], row["start"]) for row in rows] == [
        ("start", "9", 0), ("end", "9", 0),
    ]  # fmt: skip
    assert rows[1]["checkpoint"] == "step-00000004"


def test_it_needs_nothing_that_is_slow_to_import():
    code = "import sys, slurm.restart; print({'torch', 'numpy', 'omegaconf'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PATH.parents[1], capture_output=True, text=True
    )
    assert done.stdout == "set()\n", done.stderr
