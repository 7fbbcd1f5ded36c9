"""The list of a checkpoint's files, `files.json`: what was written is what is loaded."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tidar_common.errors import UserError
from tidar_common.files import fsync_folder, sha256_of, write_text_atomic

FILE_LIST = "files.json"
MAX_LIST_BYTES = 64 << 20
"""A list of some hundred thousand files; what is larger is no list."""
FileEntry = dict[str, Any]
"""`bytes` and `sha256` of a file."""


def entry_of(path: Path) -> FileEntry:
    """Bring a written file to disk and describe it."""
    _fsync(path)
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def write_file_list(folder: Path, known: Mapping[str, FileEntry] | None = None) -> int:
    """List every file under `folder` with its size and SHA-256, after all are on disk.

    Args:
        folder: of the checkpoint.
        known: entries of files, by path in `folder`, that other ranks wrote and hashed; their
            sizes are checked, the rest is hashed here.

    Returns:
        The bytes of all files.

    Raises:
        OSError: when a known file is not there with its size.
    """
    known = known or {}
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != FILE_LIST):
        name = path.relative_to(folder).as_posix()
        files[name] = known[name] if name in known else entry_of(path)
    for name, entry in known.items():
        found = (folder / name).stat().st_size
        if found != entry["bytes"]:
            raise OSError(f"{folder / name}: has {found} bytes instead of {entry['bytes']}")
    write_text_atomic(folder / FILE_LIST, json.dumps({"files": files}, indent=1) + "\n")
    fsync_folder(folder)
    return sum(int(entry["bytes"]) for entry in files.values())


def verify_file_list(folder: Path) -> None:
    """Check every file of the list; raises UserError naming the first that is missing or differs.

    Sizes are compared before hashes, so that truncation is found without reading everything.
    """
    listed = _read_list(folder)
    for name, (size, _) in listed.items():
        file = folder / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise UserError(f"{file}: {what}; use another checkpoint")
    for name, (_, digest) in listed.items():
        if sha256_of(folder / name) != digest:
            raise UserError(f"{folder / name}: differs from what was saved; use another checkpoint")


def _read_list(folder: Path) -> dict[str, tuple[int, str]]:
    path = folder / FILE_LIST
    try:
        if path.stat().st_size > MAX_LIST_BYTES:
            raise ValueError(f"more than {MAX_LIST_BYTES} bytes")
        files = json.loads(path.read_text())["files"]
        listed = {name: (int(f["bytes"]), str(f["sha256"])) for name, f in files.items()}
        for name in listed:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError(f"{name!r} lies outside of the checkpoint")
        if not listed:
            raise ValueError("it lists nothing")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: missing or damaged, the checkpoint is not complete") from error
    return listed


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
