"""The files of a corpus, on a disk or behind a URL (`s3://`, `gs://`, `hf://`) through fsspec."""

import glob
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import IO, Any

from tidar_common.errors import UserError

REMOTE_BLOCK_BYTES = 8 << 20
"""What one request fetches from an object store."""
READ_BYTES = 1 << 18
"""What one read fetches: long lines want much, and short parts of a file little."""


@dataclass(frozen=True)
class File:
    """One file of a corpus."""

    path: str
    """A path, or a URL."""
    name: str
    """Relative to the corpus, with `/`: what ids are made of."""
    size: int
    stamp: str
    """Changes when the file does: from its size and time, or what the store gives for it."""


def is_url(path: str) -> bool:
    return "://" in path


def find_files(path: str, patterns: Sequence[str], key: str) -> list[File]:
    """`path` itself if it is a file, else the files below it that match, sorted by name.

    A path with `*`, `?` or `[` that is no file or folder itself stands for all that match it.
    Folders that are links are read too; a file that can be reached in several ways is read once.

    Raises:
        UserError: naming `key`, when there are none or the place cannot be listed.
    """
    matching = _remote_files(path, patterns, key) if is_url(path) else _local(path, patterns, key)
    if not matching:
        raise UserError(f"{key}: no file matching {' or '.join(patterns)} under {path}")
    return matching


def local_file(path: Path, name: str) -> File:
    """A file on this machine; one that is gone has no size, and is met when it is read."""
    try:
        status = path.stat()
    except OSError:
        return File(str(path), name, 0, "gone")
    return File(str(path), name, status.st_size, f"{status.st_size}-{status.st_mtime_ns}")


def open_binary(path: str) -> IO[bytes]:
    """Open a path or a URL for reading; raises OSError, also for what a store answers."""
    if not is_url(path):
        return open(path, "rb", buffering=READ_BYTES)
    system, inside = _filesystem(path, "corpus.path")
    try:
        file = system.open(inside, "rb", block_size=REMOTE_BLOCK_BYTES)
    except OSError:
        raise
    except Exception as error:  # stores have exceptions of their own
        raise OSError(f"{path}: {error}") from error
    return io.BufferedReader(file, READ_BYTES)  # lines out of fsspec's own files are slow


def open_text_stream(path: str) -> IO[bytes]:
    """Open for reading, unpacked on the way where the name ends in `.gz`, `.zst` or `.zstd`."""
    raw = open_binary(path)
    if path.endswith(".gz"):
        import gzip

        return gzip.open(raw, "rb")  # type: ignore[return-value]
    if not path.endswith((".zst", ".zstd")):
        return raw
    pyarrow = needed("pyarrow", path, "parquet")
    return io.BufferedReader(
        pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
    )


def needed(module: str, what: str, extra: str) -> Any:
    """Import an optional package; UserError naming the extra that brings it where it is absent."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UserError(
            f"{what}: needs {package} to be read; pip install 'tidar-pretrain[{extra}]'"
        ) from error


def _local(path: str, patterns: Sequence[str], key: str) -> list[File]:
    root = Path(path).expanduser()
    if not root.exists() and glob.has_magic(str(root)):
        places = [Path(place) for place in sorted(glob.glob(str(root), recursive=True))]
        while glob.has_magic(str(root)):  # names are relative to what stands before the first star
            root = root.parent
    else:
        places = [root]
    if not root.exists():
        raise UserError(f"{key}: {path} does not exist; give a file or a folder")
    if any(not pattern or Path(pattern).is_absolute() for pattern in patterns):
        raise UserError(
            f"{key}: cannot look for {patterns[0]!r} under {path}; give a name's pattern"
        )
    paths: dict[str, Path] = {}
    for place in places:
        if place.is_file():
            paths.setdefault(os.path.realpath(place), place)
            continue
        for file, real in _walk(place, key):
            if any(file.relative_to(place).match(pattern) for pattern in patterns):
                paths.setdefault(real, file)
    if paths and root.is_file():
        return [local_file(root, root.name)]
    return [local_file(p, p.relative_to(root).as_posix()) for p in sorted(paths.values())]


def _walk(root: Path, key: str) -> Iterator[tuple[Path, str]]:
    """Every file below `root` and its path without links, each folder once: what stands there
    itself first, then what is behind links, in the order of their names."""

    def fail(error: OSError) -> None:
        raise UserError(f"{key}: {error.filename} cannot be listed ({error.strerror})") from error

    seen: set[str] = set()
    linked_files: list[Path] = []
    waiting = [root]
    while waiting:
        links: list[Path] = []
        for start in waiting:
            for name, folders, files in os.walk(start, onerror=fail):
                folder, real = Path(name), os.path.realpath(name)
                if real in seen:
                    folders.clear()
                    continue
                seen.add(real)
                links += sorted(folder / sub for sub in folders if (folder / sub).is_symlink())
                linked = [file for file in sorted(files) if (folder / file).is_symlink()]
                for file in sorted(set(files) - set(linked)):
                    if (folder / file).is_file():
                        yield folder / file, os.path.join(real, file)
                linked_files += (folder / file for file in linked if (folder / file).is_file())
        waiting = links
    yield from ((file, os.path.realpath(file)) for file in linked_files)


def _remote_files(path: str, patterns: Sequence[str], key: str) -> list[File]:
    system, inside = _filesystem(path, key)
    try:
        if glob.has_magic(inside) and not system.exists(inside):
            matching: dict[str, Any] = {}
            for place in system.glob(inside):
                matching |= system.find(place, detail=True)
            while glob.has_magic(inside):
                inside = inside.rpartition("/")[0]
        else:
            matching = system.find(inside, detail=True)
    except Exception as error:  # stores have exceptions of their own
        raise UserError(f"{key}: {path} cannot be listed ({error})") from error
    files = []
    for name, details in sorted(matching.items()):
        relative = name.removeprefix(inside).lstrip("/") or PurePosixPath(name).name
        whole = name == inside
        if whole or any(fnmatch(PurePosixPath(name).name, pattern) for pattern in patterns):
            mark = next(
                (details[field] for field in ("ETag", "etag", "md5Hash", "mtime", "LastModified")
                 if details.get(field)), "")  # fmt: skip
            size = int(details.get("size") or 0)
            files.append(File(system.unstrip_protocol(name), relative, size, f"{size}-{mark}"))
    return files


def _filesystem(path: str, key: str) -> tuple[Any, str]:
    import fsspec

    try:
        return fsspec.core.url_to_fs(path)
    except ImportError as error:
        raise UserError(f"{key}: {path} needs another package ({error})") from error
    except (ValueError, OSError) as error:
        raise UserError(f"{key}: {path} cannot be opened ({error})") from error


def spans_of(sizes: Iterable[int], most: int) -> Iterator[tuple[int, int, int]]:
    """Neighbours together, up to about `most`: the first, the one behind the last, and their size;
    a larger one stands alone."""
    first = end = size = 0
    for item in sizes:
        if end > first and size + item > most:
            yield first, end, size
            first, size = end, 0
        size += item
        end += 1
    if end > first:
        yield first, end, size


def runs_of(files: Sequence[File], run_bytes: int) -> Iterator[Sequence[File]]:
    """Neighbouring files together, up to about `run_bytes`; a larger file stands alone."""
    for first, end, _ in spans_of((file.size for file in files), run_bytes):
        yield files[first:end]


def os_reason(error: OSError) -> str:
    """Why a file cannot be read, in few words, the same on every machine."""
    return error.strerror or (os.strerror(error.errno) if error.errno else "store error")
