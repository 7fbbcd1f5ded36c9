"""`tidar-status` on the files of a real run, and on what is left of others."""

import json
import os
import shutil

import pytest

from pipeline.status import main, read_status
from tidar_common.errors import UserError


@pytest.fixture
def run_dir(trained_run, tmp_path):
    """A copy of the trained run, as if it had been asked for 40 steps."""
    copy = tmp_path / "run"
    shutil.copytree(trained_run, copy, ignore=shutil.ignore_patterns("wandb"))
    config = (copy / "config.yaml").read_text().replace("\nsteps: 12\n", "\nsteps: 40\n")
    (copy / "config.yaml").write_text(config)
    os.utime(copy / "metrics.jsonl", (1000.0, 1000.0))
    return copy


def test_a_finished_run(trained_run):
    status = read_status(trained_run, 1e12)
    assert (status.state, status.step, status.steps) == ("finished", 12, 12)
    assert status.checkpoint == "step-00000012"
    assert status.last_eval is not None
    assert status.last_eval["step"] == 12
    rows = [json.loads(line) for line in (trained_run / "metrics.jsonl").open()]
    assert status.tokens == rows[-1]["tokens"]
    assert status.loss == rows[-1]["loss"]


@pytest.mark.parametrize(("now", "state"), [(1001.0, "running"), (1000.0 + 7200, "quiet")])
def test_time_tells_running_from_quiet(run_dir, now, state):
    status = read_status(run_dir, now)
    assert status.state == state
    assert status.quiet_seconds == pytest.approx(now - 1000.0)
    assert status.seconds_left == pytest.approx(28 * status.step_seconds)


def test_a_stopped_run_says_what_a_restart_would_lose(run_dir):
    (run_dir / "interrupted").touch()
    shutil.rmtree(run_dir / "checkpoints" / "step-00000012")
    status = read_status(run_dir, 1001.0)
    assert status.state == "stopped"
    assert dict(status.rows())["checkpoint"] == "step-00000008, 4 steps behind"
    shutil.rmtree(run_dir / "checkpoints")
    assert dict(read_status(run_dir, 1001.0).rows())["checkpoint"] == "none yet"


def test_starts_are_counted_by_how_they_ended(run_dir):
    record = run_dir / "starts.jsonl"
    assert dict(read_status(run_dir, 1001.0).rows())["starts"] == "1", "by its events"
    lines = [
        {"event": "start"}, {"event": "end", "code": 75},
        {"event": "start"},
        {"event": "start"}, {"event": "end", "code": 1, "failed_node": "n7", "why": "crash 1"},
    ]  # fmt: skip
    record.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"event": "st')
    shown = dict(read_status(run_dir, 1001.0).rows())["starts"]
    assert shown == (
        "3: 1 saved and requeued, 1 crashed, 1 without a recorded end; "
        "last ended with 1 on n7: crash 1"
    )
    (run_dir / "events.jsonl").unlink()
    record.write_text('{"event": "start"}\n')
    assert dict(read_status(run_dir, 1001.0).rows())["starts"] == "1"


def test_the_expected_end_is_the_last_step_s_time_and_what_is_left(run_dir):
    running = read_status(run_dir, 1001.0)
    assert running.expected_end == pytest.approx(1000.0 + 28 * running.step_seconds)
    assert "expected end" in dict(running.rows())
    assert read_status(run_dir, 1e12).expected_end is None


def test_the_command(run_dir, tmp_path, capsys):
    assert main([str(run_dir), str(tmp_path / "nothing")]) == 2
    out, err = capsys.readouterr()
    assert "12 of 40" in out
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    with pytest.raises(UserError, match="no such run directory"):
        read_status(tmp_path / "nothing", 0.0)


def test_it_names_what_ran_and_what_there_is_to_open(run_dir, capsys):
    assert main([str(run_dir), "--report"]) == 0
    assert capsys.readouterr().out == f"{run_dir / 'report.html'}\n"
    shown = dict(read_status(run_dir, 1001.0).rows())
    assert shown["report"] == str(run_dir / "report.html")
    assert "W&B" not in shown
    (run_dir / "wandb").mkdir()
    assert dict(read_status(run_dir, 1001.0).rows())["W&B"] == str(run_dir / "wandb")
    environment = json.loads((run_dir / "environment.json").read_text())
    assert f"torch {environment['packages']['torch']}" in shown["ran as"]
    assert shown["ran as"].endswith("2 x cpu on 1 host")
    assert environment["command"].startswith("tidar-train data.dir=")
    assert "ran as" in (run_dir / "report.html").read_text()
    (run_dir / "environment.json").write_text('{"git_commit": 5, "devices": [], "pack')
    assert "ran as" not in dict(read_status(run_dir, 1001.0).rows())


def test_the_runs_of_a_sweep_are_a_table(run_dir, tmp_path, capsys):
    sweep = tmp_path / "sweep"
    run_dir.rename(sweep.parent / "steps-40")
    sweep.mkdir()
    (sweep.parent / "steps-40").rename(sweep / "steps-40")
    (sweep / "steps-50").mkdir()
    (sweep / "steps-50" / "config.yaml").write_text("steps: 50\n")
    assert main([str(sweep)]) == 0
    path, head, first, second = capsys.readouterr().out.splitlines()
    assert path == str(sweep)
    assert head.split()[:4] == ["run", "state", "step", "loss"]
    last = [json.loads(line) for line in (sweep / "steps-40" / "metrics.jsonl").open()][-1]
    assert first.split()[:4] == ["steps-40", "quiet", "12", f"{last['loss']:.3f}"]
    assert first.split()[-1] == "step-00000012"
    assert second.split()[:4] == ["steps-50", "no", "step", "yet"]
    assert main(["--table", str(sweep / "steps-50"), str(sweep / "none")]) == 0
    _, *named = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in named] == ["steps-50", "none"]
