"""The list of a checkpoint's files, `files.json`: what was written is what is loaded."""

import json
import os
from pathlib import Path

from data_prep.errors import UserError
from data_prep.files import fsync_folder, sha256_of, write_text_atomic

FILE_LIST = "files.json"


def write_file_list(folder: Path) -> None:
    """List every file under `folder` with its size and SHA-256, after all are on disk."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != FILE_LIST):
        _fsync(path)
        name = path.relative_to(folder).as_posix()
        files[name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    write_text_atomic(folder / FILE_LIST, json.dumps({"files": files}, indent=1) + "\n")
    fsync_folder(folder)


def verify_file_list(folder: Path) -> None:
    """Check every file of the list; raises UserError naming the first that is missing or differs.

    Sizes are compared before hashes, so that truncation is found without reading everything.
    """
    path = folder / FILE_LIST
    try:
        files = json.loads(path.read_text())["files"]
        listed = {name: (int(f["bytes"]), str(f["sha256"])) for name, f in files.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: missing or damaged, the checkpoint is not complete") from error
    for name, (size, _) in listed.items():
        file = folder / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise UserError(f"{file}: {what}; use another checkpoint")
    for name, (_, digest) in listed.items():
        if sha256_of(folder / name) != digest:
            raise UserError(f"{folder / name}: differs from what was saved; use another checkpoint")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
