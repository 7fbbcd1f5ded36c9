"""The real command, killed or interrupted in the middle: a rerun comes to the same bytes."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.formats.manifest import Manifest
from tidar_common.files import sha256_of

REPOSITORY = Path(__file__).resolve().parents[2]


def start(overrides, folder, workers):
    """`tidar-prepare` as a process group of its own, as a terminal starts it."""
    arguments = [*overrides, f"output_dir={folder}", f"workers={workers}"]
    return subprocess.Popen(
        [sys.executable, "-m", "data_prep.prepare", *arguments],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Tests started in the background of a script ignore Ctrl-C, which a process would inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def wait_for_tasks(process, folder, count):
    deadline = time.monotonic() + 60
    while len(list(folder.glob("tasks/*.rests"))) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture(scope="module")
def large(overrides, texts, write_corpus, tmp_path_factory):
    """Enough text for a run of some seconds, and small tasks: it is caught in the middle."""
    folder = tmp_path_factory.mktemp("large")
    many = [f"{number} {text}" for number in range(20) for text in texts]
    path = write_corpus(folder / "text.jsonl", many)
    changes = [f"corpus.path={path}", "sequence_length=256", "shard_sequences=60"]
    return [*overrides, *changes, "task_bytes=200000"]


@pytest.fixture(scope="module")
def uninterrupted(large, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "data"
    process = start(large, folder, 1)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return Manifest.load(folder)


@pytest.mark.parametrize(("ending", "workers"), [("SIGKILL", 1), ("SIGKILL", 2), ("Ctrl-C", 2)])
def test_a_rerun_keeps_finished_tasks_and_gives_the_same(
    large, uninterrupted, tmp_path, ending, workers
):
    folder = tmp_path / "data"
    process = start(large, folder, workers)
    wait_for_tasks(process, folder, 3)
    if ending == "SIGKILL":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGINT)
    interrupted_at = time.monotonic()
    # The pipes end when the last process that holds them has ended: workers too.
    _, errors = process.communicate(timeout=30)
    assert time.monotonic() - interrupted_at < 10
    if ending == "SIGKILL":
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130
        assert errors == "interrupted; run the same command again to continue\n"
    assert not (folder / "manifest.json").exists()
    finished = sorted((folder / "tasks").glob("[0-9]*.json"))
    assert len(finished) >= 2
    again = start(large, folder, 1)
    out, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    done, _, total = out.partition(" tasks are done already")[0].partition(" of ")
    assert int(done) == len(finished) < int(total), "finished tasks must not be done again"
    manifest = Manifest.load(folder)
    assert manifest == uninterrupted
    for shard in manifest.train.shards:
        assert sha256_of(folder / shard.name) == shard.sha256
    assert not list(folder.rglob("*.writing"))
    assert not (folder / "tasks").exists()


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments_it_comes_to_the_same(large, uninterrupted, tmp_path, seed):
    """Until one run in the chain lives long enough, with any number of workers."""
    folder, rng = tmp_path / "data", random.Random(seed)
    kills = 0
    while True:
        process = start(large, folder, rng.randint(1, 3))
        try:
            # Short at first, so that the quickest machine is interrupted, too.
            process.communicate(timeout=rng.uniform(0.2, 0.8 + kills / 2))
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate(timeout=30)
            kills += 1
    assert kills > 0
    assert process.returncode == 0
    assert Manifest.load(folder) == uninterrupted
    for shard in uninterrupted.train.shards:
        assert sha256_of(folder / shard.name) == shard.sha256


@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_line_and_room_continues(large, uninterrupted, tmp_path, workers):
    """A file system of 300 KB, made larger afterwards; needs the right to mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no right to mount a file system")
    try:
        process = start(large, folder / "data", workers)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 2, errors
        assert errors.count("\n") == 1
        assert "cannot be written (No space left on device)" in errors
        assert not (folder / "data" / "manifest.json").exists()
        subprocess.run(["mount", "-o", "remount,size=100m", str(folder)], check=True)
        process = start(large, folder / "data", workers)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert Manifest.load(folder / "data") == uninterrupted
    finally:
        subprocess.run(["umount", str(folder)], check=False)
