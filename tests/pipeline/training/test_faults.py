"""Faults in real runs: each ends, or goes on, as `docs/training.md` promises."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from commands import ROOT, SMALL_RUN, command, run, train_small

from pipeline.training.moments import CLOCK

QUICK = ("steps=8", "checkpoint.every=3", "evals.decode_speed.every=0", "wandb.mode=disabled")
SECRET = "0123456789abcdef" * 2 + "01234567"


def rows(run_dir: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def exact(run_dir: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows(run_dir)]


def events(run_dir: Path, kind: str) -> list[dict]:
    return [row for row in rows(run_dir, "events.jsonl") if row["event"] == kind]


def faulty(
    data_dir: Path, run_dir: Path, fault: str, *overrides: str, processes=None, **environment: str
):
    values = (f"data.dir={data_dir}", f"run_dir={run_dir}", *SMALL_RUN, *QUICK, *overrides)
    environment["TIDAR_TEST_FAULT"] = fault
    return run("tests.faulty_train", *values, processes=processes, **environment)


def test_a_step_that_is_not_finite_is_skipped_and_recorded(data_dir, tmp_path):
    """Global batch 8, micro-batch 2: the 10th loss is in step 3, of sequences 16 to 23."""
    choices = ("anomalies.max_skipped_in_a_row=1", "wandb.mode=offline",
               "data.cache_dir=/nowhere/${oc.env:HF_TOKEN}")  # fmt: skip
    done = faulty(data_dir, tmp_path, "nan:10", *choices, WANDB_API_KEY=SECRET, HF_TOKEN=SECRET)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 4, 5, 6, 7, 8]
    (skipped,) = events(tmp_path, "step_skipped")
    assert (skipped["step"], skipped["quantity"]) == (3, "gradient")
    assert (skipped["first_sequence"], skipped["last_sequence"]) == (16, 23)
    assert rows(tmp_path)[-1]["sequences_seen"] == 64
    saved = [event["step"] for event in events(tmp_path, "checkpoint_saved")]
    assert saved == [3, 6, 8]
    assert all(event["total_s"] > 0 for event in events(tmp_path, "checkpoint_saved"))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    for path in files:  # secrets of the environment stay there
        assert SECRET.encode() not in path.read_bytes(), path
    assert SECRET not in done.stdout + done.stderr
    assert "/nowhere/${oc.env:" in (tmp_path / "config.yaml").read_text()


def test_a_second_run_in_the_same_place_is_refused_and_a_crash_frees_it(data_dir, tmp_path):
    values = (f"data.dir={data_dir}", f"run_dir={tmp_path}", *SMALL_RUN, *QUICK, "steps=5000")
    first = subprocess.Popen(
        command("pipeline.train", *values), cwd=ROOT, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for(tmp_path / "metrics.jsonl", first)
        second = train_small(data_dir, tmp_path, *QUICK)
        assert second.returncode == 2
        assert f"is in use by process {first.pid} on" in second.stderr
    finally:
        first.kill()
        first.wait()
    assert (tmp_path / ".lock").is_file()  # left behind, and in nobody's way


def wait_for(path: Path, process: subprocess.Popen, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not (path.exists() and path.stat().st_size):
        assert time.monotonic() < deadline, f"{path} did not appear"
        assert process.poll() is None, f"ended with {process.returncode}"
        time.sleep(0.05)


def test_other_processes_and_stages_continue_the_same_run(data_dir, trained_run, tmp_path):
    """2 -> 1 -> 2 processes and ZeRO 1 -> 3 -> 2, from steps 8 and 10 of 12."""
    run_dir = tmp_path / "run"
    shutil.copytree(trained_run, run_dir)
    changes = [(None, "deepspeed=zero3", "micro_batch_size=4"), (2, "deepspeed=zero2")]
    for processes, *overrides in changes:
        shutil.rmtree(run_dir / "checkpoints" / "step-00000012")
        done = train_small(data_dir, run_dir, "checkpoint.every=2", "wandb.mode=disabled",
                           *overrides, processes=processes)  # fmt: skip
        assert done.returncode == 0, done.stderr
    straight, changed = rows(trained_run), rows(run_dir)
    assert [row["data_digest"] for row in changed] == [row["data_digest"] for row in straight]
    for row, expected in zip(changed, straight, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=2e-4)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
    keys = [event["key"] for event in events(run_dir, "config_changed")]
    assert keys == ["processes", "deepspeed.stage"] * 2


def test_a_stop_in_an_eval_leaves_it_at_once_and_the_next_start_repeats_it(
    data_dir, trained_run, tmp_path
):
    """One of two ranks is asked in the last eval, whose step is saved; without another sign of it
    the run would count as finished."""
    run_dir = tmp_path / "run"
    shutil.copytree(trained_run, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step-00000012")
    values = (f"data.dir={data_dir}", f"run_dir={run_dir}", *SMALL_RUN, "wandb.mode=disabled")
    done = run("tests.faulty_train", *values, processes=2, TIDAR_TEST_FAULT="stop_eval:6:1")
    assert done.returncode == 0, done.stderr
    assert "after step 12 and saved" in done.stdout
    assert (run_dir / "interrupted").exists()
    assert {row["step"] for row in rows(run_dir, "evals/decode_speed.jsonl")} == {6}
    assert exact(run_dir) == exact(trained_run)
    done = train_small(data_dir, run_dir, "wandb.mode=disabled", processes=2)
    assert done.returncode == 0, done.stderr
    assert not (run_dir / "interrupted").exists()
    found, expected = (rows(path, "evals/decode_speed.jsonl") for path in (run_dir, trained_run))
    for name in ("step", "method", "temperature", "tokens", "forwards", "ar_loss"):
        assert [row[name] for row in found] == [row[name] for row in expected]


@pytest.mark.long
def test_many_bad_steps_in_a_row_end_the_run(data_dir, tmp_path):
    done = faulty(data_dir, tmp_path, "nan:17:on", "anomalies.max_skipped_in_a_row=2")
    assert done.returncode == 3
    assert "step 7: gradient is not finite" in done.stderr
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000006\n"


@pytest.mark.long
def test_a_rank_that_hangs_ends_the_job_with_all_stacks(data_dir, tmp_path):
    started = time.monotonic()
    done = faulty(data_dir, tmp_path, "hang_data:30:1", "watch.hang_timeout_s=6",
                  "watch.data_stall_s=2", processes=2)  # fmt: skip
    assert done.returncode != 0
    assert time.monotonic() - started < 120
    assert "warning: rank 1 on" in done.stderr
    assert "for data" in done.stderr
    for rank in (0, 1):
        assert f"error: rank {rank} on" in done.stderr
    assert done.stderr.count("most recent call first") >= 2
    assert "faulty_train.py" in done.stderr  # where it hangs


@pytest.mark.long
def test_when_a_rank_is_killed_the_other_ends_with_a_clear_message(data_dir, tmp_path):
    done = faulty(data_dir, tmp_path, "kill_step:9:1", processes=2)
    assert done.returncode != 0
    assert "rank 0 on" in done.stderr
    assert "lost another process of the run" in done.stderr


@pytest.mark.long
@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_full_disk_stops_the_run_with_the_old_checkpoint_intact(data_dir, tmp_path, asynchronous):
    choice = f"checkpoint.asynchronous={asynchronous}"
    done = faulty(data_dir, tmp_path, "full_disk:2", choice)
    assert done.returncode == 3, done.stderr
    assert "checkpoint of step 6 could not be written" in done.stderr
    assert "step-00000003 is intact" in done.stderr
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", "step-00000003"]
    done = train_small(data_dir, tmp_path, *QUICK, choice)  # the disk has room again
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 9))


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 4 MB; a real one, which needs root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    made = subprocess.run(mount, capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.long
@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_small_disk_that_fills_up_in_a_save(data_dir, small_disk, asynchronous):
    """It is full after the check for free space, while two ranks write; with room it goes on."""
    run_dir, choice = small_disk / "run", f"checkpoint.asynchronous={asynchronous}"
    done = faulty(data_dir, run_dir, "real_full_disk:2:0", choice, processes=2,
                  TIDAR_TEST_DISK=str(small_disk))  # fmt: skip
    assert done.returncode != 0
    assert "checkpoint of step 6 could not be written" in done.stderr
    assert "step-00000003 is intact" in done.stderr
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert names == ["latest", "step-00000003"]
    (small_disk / "filler").unlink()
    done = train_small(data_dir, run_dir, *QUICK, choice, processes=2)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in rows(run_dir)] == list(range(1, 9))


@pytest.mark.long
def test_a_step_longer_than_torchrun_waits_costs_no_more_than_a_kill(data_dir, tmp_path):
    """torchrun kills its ranks some seconds after a signal, 30 if it is not told otherwise; here 3
    (torch before 2.12 knows no other than 30), and a step of 60 s. No rank is left, and the same
    command goes on from the last checkpoint."""
    straight, run_dir = tmp_path / "straight", tmp_path / "run"
    assert train_small(data_dir, straight, *QUICK, processes=2).returncode == 0
    values = (f"data.dir={data_dir}", f"run_dir={run_dir}", *SMALL_RUN, *QUICK)
    environment = {"TIDAR_TEST_FAULT": "slow_step:9", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3"}
    launcher = subprocess.Popen(
        command("tests.faulty_train", *values, processes=2), cwd=ROOT, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **environment},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (run_dir / "metrics.jsonl").exists() or len(rows(run_dir)) < 4:
        assert time.monotonic() < deadline, "step 4 was not reached"
        time.sleep(0.05)
    time.sleep(1)  # into the slow step
    holder = json.loads((run_dir / ".lock").read_text())["pid"]
    launcher.send_signal(signal.SIGTERM)
    launcher.wait(timeout=50)
    assert not Path(f"/proc/{holder}").exists()
    assert not (run_dir / "interrupted").exists()
    assert (run_dir / "checkpoints" / "latest").read_text() == "step-00000003\n"
    assert train_small(data_dir, run_dir, *QUICK, processes=2).returncode == 0
    assert exact(run_dir) == exact(straight)


@pytest.mark.long
def test_from_one_process_to_two_and_back(data_dir, tmp_path):
    """1 -> 2 -> 1 processes with ZeRO 1 -> 3 -> 2, and the optimizer on the host in the middle."""
    straight, changed = tmp_path / "straight", tmp_path / "changed"
    common = ("checkpoint.every=4", "checkpoint.keep_last=0", "wandb.mode=disabled",
              "evals.decode_speed.every=0")  # fmt: skip
    assert train_small(data_dir, straight, *common).returncode == 0
    shutil.copytree(straight, changed)
    stages = [(4, 2, "deepspeed=zero3", "deepspeed.offload_optimizer=true"),
              (8, None, "deepspeed=zero2", "micro_batch_size=4")]  # fmt: skip
    for kept, processes, *overrides in stages:
        for folder in (changed / "checkpoints").glob("step-*"):
            if int(folder.name.removeprefix("step-")) > kept:
                shutil.rmtree(folder)
        done = train_small(data_dir, changed, *common, *overrides, processes=processes)
        assert done.returncode == 0, done.stderr
    for row, expected in zip(rows(changed), rows(straight), strict=True):
        assert row["data_digest"] == expected["data_digest"]
        assert row["loss"] == pytest.approx(expected["loss"], rel=2e-4)
    changes = {event["key"]: event["now"] for event in events(changed, "config_changed")}
    assert changes["processes"] == 1
    assert changes["deepspeed.stage"] == 2


@pytest.mark.long
def test_ranks_whose_launcher_was_killed_save_and_leave(data_dir, tmp_path):
    values = (f"data.dir={data_dir}", f"run_dir={tmp_path}", *SMALL_RUN, *QUICK, "steps=100000")
    launcher = subprocess.Popen(
        command("pipeline.train", *values, processes=2), cwd=ROOT, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for(tmp_path / "metrics.jsonl", launcher)
    holder = json.loads((tmp_path / ".lock").read_text())["pid"]
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{holder}").exists():
        assert time.monotonic() < deadline, "the rank went on without its launcher"
        time.sleep(0.1)
    assert (tmp_path / "interrupted").exists()
    last = rows(tmp_path)[-1]["step"]
    assert (tmp_path / "checkpoints" / f"step-{last:08d}").is_dir()


@pytest.mark.long
@pytest.mark.parametrize("how", ["flipped", "truncated", "deleted", "emptied"])
def test_every_kind_of_damage_to_every_file_is_found(trained_run, tmp_path, how):
    from pipeline.checkpoint.files import verify_file_list
    from tidar_common.errors import UserError

    source = trained_run / "checkpoints" / "step-00000012"
    for name in sorted(path.name for path in source.iterdir()):
        folder = tmp_path / name
        shutil.copytree(source, folder)
        damage(folder / name, how)
        with pytest.raises(UserError, match=r"files.json|" + name):
            verify_file_list(folder)


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "deleted":
        path.unlink()
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
