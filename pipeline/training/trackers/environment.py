"""What a run ran as: revision, package versions, hosts. For readers; nothing depends on it."""

import json
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from tidar_common.files import write_text_atomic
from tidar_common.run_files import ENVIRONMENT
from tidar_common.secrets import without_secrets

PACKAGES = ("torch", "deepspeed", "transformers", "numpy", "webdataset", "hydra-core", "wandb")
ROOT = Path(__file__).resolve().parents[3]
GIT_TIMEOUT_S = 10


def describe_rank(device: torch.device) -> dict[str, str]:
    """Where this process runs; what rank 0 cannot see of the others."""
    is_gpu = device.type == "cuda"
    return {
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name(device) if is_gpu else "cpu",
    }


def describe_environment(ranks: list[dict[str, str]]) -> dict[str, Any]:
    """Plain values; what cannot be found out is None.

    Args:
        ranks: `describe_rank` of every process, in order of rank.
    """
    status = git("status", "--porcelain", "--untracked-files=no")
    return {
        "command": without_secrets(shlex.join(["tidar-train", *sys.argv[1:]])),
        "git_commit": git("rev-parse", "HEAD"),
        "git_changed": None if status is None else bool(status),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)),
        "hosts": dict(Counter(rank["host"] for rank in ranks)),
        "devices": dict(Counter(rank["device"] for rank in ranks)),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "slurm_nodes": os.environ.get("SLURM_JOB_NODELIST"),
        "slurm_start": os.environ.get("SLURM_RESTART_COUNT"),
        "processes": len(ranks),
    }


def write_environment(run_dir: Path, environment: dict[str, Any]) -> None:
    """Leave it in the run directory, for `tidar-status` and the report."""
    write_text_atomic(run_dir / ENVIRONMENT, json.dumps(environment, indent=2) + "\n")


def git(*arguments: str) -> str | None:
    """Output of a git command in this checkout; None without git or in an installed copy."""
    if not (ROOT / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments],
            capture_output=True,
            text=True,
            timeout=GIT_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
