"""Files that are either complete or not there: temporary names, fsync, rename, hashes."""

import hashlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

HASH_CHUNK_BYTES = 1 << 20
MAX_TEXT_BYTES = 64 << 20
"""A config or another small text; what is larger is none, and is not read into memory."""


@contextmanager
def written_atomically(path: Path, *, sync_folder: bool = True) -> Iterator[BinaryIO]:
    """A binary file that appears at `path` when the block ends well, and not at all otherwise.

    Without `sync_folder` its name may be lost with the machine until the folder is synced, as the
    next file in it does; what has a name is whole in any case.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The writer's name is in it: two machines may write the same file, and the last one wins.
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.writing")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if sync_folder:
        fsync_path(path.parent)


def write_text_atomic(path: Path, text: str) -> None:
    """Write UTF-8 `text` to `path`, all or nothing."""
    with written_atomically(path) as file:
        file.write(text.encode())


def read_text_checked(path: Path, most: int = MAX_TEXT_BYTES) -> str:
    """The UTF-8 text of a file of at most `most` bytes; ValueError where it is larger."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(most + 1) if size <= most else b""
    if max(size, len(content)) > most:
        raise ValueError(f"it has more than the {most:,} bytes that a file of its kind may have")
    return content.decode()


def fsync_path(path: Path) -> None:
    """Make a file's content, or the renames inside a folder, survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
