"""What a run ran as: revision, package versions, hosts. For trackers; nothing depends on it."""

import os
import platform
import socket
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "deepspeed", "transformers", "numpy", "webdataset", "hydra-core", "wandb")
ROOT = Path(__file__).resolve().parents[3]
GIT_TIMEOUT_S = 10


def describe_environment() -> dict[str, Any]:
    """Plain values; what cannot be found out is None."""
    status = git("status", "--porcelain", "--untracked-files=no")
    return {
        "git_commit": git("rev-parse", "HEAD"),
        "git_changed": None if status is None else bool(status),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "host": socket.gethostname(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "slurm_nodes": os.environ.get("SLURM_JOB_NODELIST"),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }


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
