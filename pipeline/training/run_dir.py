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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from data_prep.errors import UserError
from pipeline.distributed import World

INTERRUPTED = "interrupted"
"""File in the run directory that says: stopped by a signal, saved, to be continued."""
LOCK = ".lock"


@contextmanager
def owned(run_dir: Path, resolved: dict[str, Any], world: World) -> Iterator[None]:
    """Create and lock `run_dir`, write the resolved config to it; all ranks enter together.

    Raises:
        UserError: on all ranks, when it cannot be written or another run holds it.
    """
    descriptor, problem = None, None
    if world.is_main:
        try:
            descriptor = _take(run_dir, resolved)
        except UserError as error:
            problem = str(error)
    problem = world.from_main(problem)
    if problem is not None:
        raise UserError(problem)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _take(run_dir: Path, resolved: dict[str, Any]) -> int:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UserError(f"run_dir: {run_dir} cannot be written ({error})") from error
    try:
        _lock(descriptor, run_dir)
        (run_dir / INTERRUPTED).unlink(missing_ok=True)
        write_config(run_dir, resolved)
    except OSError as error:
        os.close(descriptor)
        raise UserError(f"run_dir: {run_dir} cannot be written ({error})") from error
    except UserError:
        os.close(descriptor)
        raise
    return descriptor


def _lock(descriptor: int, run_dir: Path) -> None:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise UserError(
            f"run_dir: {run_dir} is in use by {_holder(descriptor)}; wait for it to end, end it, "
            "or use another run_dir"
        ) from error
    started = time.strftime("%Y-%m-%d %H:%M:%S %z")
    content = {"host": socket.gethostname(), "pid": os.getpid(), "started": started}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, (json.dumps(content) + "\n").encode(), 0)


def _holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {holder['pid']} on {holder['host']} since {holder['started']}"
    except (ValueError, KeyError, TypeError):  # it is just writing its name
        return "another process"


def write_config(folder: Path, resolved: dict[str, Any]) -> None:
    (folder / "config.yaml").write_text(yaml.safe_dump(resolved, sort_keys=False))
