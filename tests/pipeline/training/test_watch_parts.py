"""Time limits, retention, spikes and slow ranks, without a run."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.checkpoint.retention import (
    CheckpointConfig,
    complete_checkpoints,
    delete_old,
    steps_to_keep,
)
from pipeline.training.guards.anomalies import Anomalies, AnomalyConfig
from pipeline.training.guards.watchdog import WatchConfig, find_slow
from pipeline.training.launch.signals import StopRequest, deadline
from tidar_common.errors import UserError
from tidar_common.run_files import Exit


@pytest.mark.parametrize(
    ("stop_before", "margin_s", "expected_s"),
    [("90m", 300, 5100), ("1d2h", 0, 93600), ("100s", 300, 50), ("auto", 60, 3540)],
)
def test_a_limit_leaves_its_margin_but_never_more_than_half(
    monkeypatch, stop_before, margin_s, expected_s
):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 3600))
    assert deadline(stop_before, margin_s) - time.time() == pytest.approx(expected_s, abs=3)


def test_no_limit(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert deadline("auto", 60) is None
    assert deadline(None, 60) is None


@pytest.mark.parametrize("value", ["soon", "10", "2001-01-01T00:00"])
def test_a_limit_that_is_no_time_or_over_is_refused(value):
    with pytest.raises(UserError, match="stop_before: "):
        deadline(value, 60)


def test_a_stop_is_asked_for_at_the_deadline():
    assert not StopRequest(time.time() + 60)
    request = StopRequest(time.time() - 1)
    assert request
    assert "stop_before" in request.name


def test_what_is_kept():
    steps = range(100, 1100, 100)
    assert steps_to_keep(steps, CheckpointConfig(keep_last=0), {}) == set(steps)
    assert steps_to_keep(steps, CheckpointConfig(keep_last=2), {300: 1.0}) == {900, 1000}
    chosen = CheckpointConfig(keep_last=1, keep_every=500, keep_best=True)
    losses = {100: float("nan"), 200: 2.0, 300: 1.5, 700: 1.8}
    assert steps_to_keep(steps, chosen, losses) == {300, 500, 1000}


def test_the_best_by_an_eval_stays_on_disk(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    for step in (1, 2, 3, 4):
        (checkpoints / f"step-{step:08d}").mkdir(parents=True)
    (tmp_path / "evals").mkdir()
    lines = ['{"step": 1, "ar_loss": 2.5}', '{"step": 2, "ar_loss": 2.0}', '{"step": 3, "ar_l']
    (tmp_path / "evals" / "decode_speed.jsonl").write_text("\n".join(lines))
    delete_old(checkpoints, CheckpointConfig(keep_last=1, keep_best=True))
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step-00000002", "step-00000004"]


def test_a_file_that_cannot_be_deleted_is_told_and_tried_again(tmp_path, monkeypatch):
    """Another user's file, a quota tool, a network disk: what is new must not depend on it."""
    old = tmp_path / "step-00000001"
    for folder in (old, tmp_path / "step-00000002"):
        folder.mkdir()
        for name in ("a.pt", "held.pt", "state.json"):
            (folder / name).touch()
    unlink = os.unlink

    def refusing(path, **options):
        if os.path.basename(path) == "held.pt":
            raise PermissionError(errno.EPERM, "Operation not permitted", path)
        unlink(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refusing)
        (line,) = delete_old(tmp_path, CheckpointConfig(keep_last=1))
        stays = tmp_path / ".deleting-step-00000001-0" / "held.pt"
        assert line == f"{stays} cannot be deleted (Operation not permitted)"
        assert list(stays.parent.iterdir()) == [stays]
        old.mkdir()  # a step of the same number, once more
        assert len(delete_old(tmp_path, CheckpointConfig(keep_last=1))) == 1
        assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-00000002"]
    assert delete_old(tmp_path, CheckpointConfig(keep_last=1)) == []
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_spikes_are_scored_against_what_came_before():
    anomalies = Anomalies(AnomalyConfig(spike_score=8))
    for step in range(40):
        assert anomalies.spikes(loss=3.0 + 0.01 * (step % 5)) == {}
    found = anomalies.spikes(loss=4.0, grad_norm=1.0)
    assert list(found) == ["loss"]
    assert found["loss"] > 30
    assert anomalies.spikes(loss=3.02) == {}
    for _ in range(100):  # spikes are left out of what later values are compared with
        assert list(anomalies.spikes(loss=4.0)) == ["loss"]
    assert list(anomalies.spikes(loss=4.0)) == ["loss"]  # a spike sets no new normal


def test_skipped_steps_in_a_row_are_counted():
    anomalies = Anomalies(AnomalyConfig(max_skipped_in_a_row=1))
    assert anomalies.skipped()
    anomalies.spikes(loss=1.0)
    assert anomalies.skipped()
    assert not anomalies.skipped()


def test_the_rank_that_others_wait_for_is_named():
    reports = [("a", 0.0, 1.0), ("a", 0.1, 1.1), ("b", 0.0, 2.0), ("b", 75.0, 1.0)]
    slow = find_slow(reports, WatchConfig(), step=50)
    assert [(event["event"], event["rank"], event["host"]) for event in slow] == [
        ("data_stall", 3, "b"), ("straggler", 2, "b"),
    ]  # fmt: skip
    assert "its forwards take 2.0 times the median" in slow[1]["message"]
    assert find_slow(reports[:2], WatchConfig(), step=50) == []


HANGING = """
import sys, time
from pathlib import Path
from pipeline.training.guards.watchdog import WatchConfig, Watchdog
with Watchdog(Path(sys.argv[1]), 3, WatchConfig(hang_timeout_s=0.5), grace_s=0.1) as watchdog:
    for _ in range(8):
        watchdog.on_phase("in a step")
        time.sleep(0.1)
    print("never too long at one thing", flush=True)
    time.sleep(60)
"""


def test_a_hang_is_ended_with_stacks_and_only_a_hang(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", HANGING, str(tmp_path)], cwd=Path(__file__).parents[3],
        capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": ".", "TIDAR_EXIT_CODE_FILE": str(tmp_path / "code")},
    )  # fmt: skip
    # For the Slurm job behind torchrun.
    assert int((tmp_path / "code").read_text()) == Exit.LOST
    assert done.returncode == Exit.LOST
    assert done.stdout == "never too long at one thing\n"
    assert "error: rank 3 on" in done.stderr
    assert "has been in a step for" in done.stderr
    assert 'File "<string>", line 10 in <module>' in done.stderr
    assert (tmp_path / ".stacks-asked-for").exists()
