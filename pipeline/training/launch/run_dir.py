"""The run directory: made, locked against a second run, marked when it was left half-way.

The lock is a POSIX record lock on `.lock`, held by rank 0. The system lets go of it when the
process ends in whatever way, also SIGKILL, so that no stale lock ever has to be removed by hand;
and ranks that outlive their launcher still hold it, so that a restart cannot run beside them.
"""

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from pipeline.distributed import World
from tidar_common.errors import UserError
from tidar_common.files import write_text_atomic
from tidar_common.run_files import CONFIG, INTERRUPTED

LOCK = ".lock"
EARLIER_START_S = 300.0
"""Longest wait for a rank that an earlier start of the same Slurm job has left behind."""
POLL_S = 1.0


class StillHeldError(RuntimeError):
    """A rank of an earlier start of this Slurm job has not let go of the run directory."""


@contextmanager
def owned(
    run_dir: Path, resolved: dict[str, Any], world: World, say: Callable[[str], None]
) -> Iterator[None]:
    """Create and lock `run_dir`, write the resolved config to it; all ranks enter together.

    A requeued Slurm job waits for a rank of its own earlier start, such as one that still writes a
    checkpoint: nobody has made a mistake, and the rank ends by itself. Any other holder is refused
    at once.

    Raises:
        UserError: on all ranks, when it cannot be written or another run holds it.
        StillHeldError: on all ranks, when the earlier start's rank has not ended in time.
    """
    descriptor, problem = None, None
    if world.is_main:
        try:
            descriptor = _take(run_dir, resolved, say)
        except (UserError, StillHeldError) as error:
            problem = (type(error), str(error))
    problem = world.from_main(problem)
    if problem is not None:
        kind, text = problem
        raise kind(text)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _take(run_dir: Path, resolved: dict[str, Any], say: Callable[[str], None]) -> int:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UserError(f"run_dir: {run_dir} cannot be written ({error})") from error
    try:
        _lock(descriptor, run_dir, say)
        (run_dir / INTERRUPTED).unlink(missing_ok=True)
        write_config(run_dir, resolved)
    except OSError as error:
        os.close(descriptor)
        raise UserError(f"run_dir: {run_dir} cannot be written ({error})") from error
    except (UserError, StillHeldError):
        os.close(descriptor)
        raise
    return descriptor


def _lock(descriptor: int, run_dir: Path, say: Callable[[str], None]) -> None:
    deadline = None
    while not _lock_now(descriptor):
        holder = _read_holder(descriptor)
        held = f"run_dir: {run_dir} is in use by {_describe(holder)}"
        if not _is_earlier_start(holder):
            raise UserError(f"{held}; wait for it to end, end it, or use another run_dir")
        if deadline is None:
            deadline = time.monotonic() + EARLIER_START_S
            say(f"{held}, of an earlier start of this job; waiting for it to end")
        if time.monotonic() >= deadline:
            raise StillHeldError(f"{held}, which an earlier start of this job has left behind")
        time.sleep(POLL_S)
    started = time.strftime("%Y-%m-%d %H:%M:%S %z")
    content = {"host": socket.gethostname(), "pid": os.getpid(), "started": started}
    content |= _slurm_start()
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, (json.dumps(content) + "\n").encode(), 0)


def _lock_now(descriptor: int) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _slurm_start() -> dict[str, str]:
    """Which start of which Slurm job this process belongs to; empty outside of Slurm."""
    if "SLURM_JOB_ID" not in os.environ:
        return {}
    start = os.environ.get("SLURM_RESTART_COUNT", "0")
    return {"slurm_job": os.environ["SLURM_JOB_ID"], "slurm_start": start}


def _is_earlier_start(holder: dict[str, Any]) -> bool:
    ours = _slurm_start()
    same_job = bool(ours) and holder.get("slurm_job") == ours["slurm_job"]
    return same_job and holder.get("slurm_start") != ours["slurm_start"]


def _read_holder(descriptor: int) -> dict[str, Any]:
    """What the holder wrote of itself; empty while it is just writing."""
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _describe(holder: dict[str, Any]) -> str:
    if not {"pid", "host", "started"} <= holder.keys():
        return "another process"
    return f"process {holder['pid']} on {holder['host']} since {holder['started']}"


def write_config(folder: Path, resolved: dict[str, Any]) -> None:
    write_text_atomic(folder / CONFIG, yaml.safe_dump(resolved, sort_keys=False))
