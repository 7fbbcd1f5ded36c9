"""Where a run's data is: the `data` section of a config, and data behind a URL.

`data.dir` may be a folder, or `https://…`, `s3://…` or another URL that webdataset or fsspec opens,
or `pipe:COMMAND`, which puts out the file whose name is added to it (`pipe:ssh host cat
/data/mine`). What a run needs of a URL is copied to a local folder as it is needed: the manifest,
the tokenizer and the index at the start, a shard when the order of the run comes to it. Every file
is checked against the manifest's hash before it counts, and a copy that failed is tried again.
"""

import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from omegaconf import DictConfig

from data_prep.formats.manifest import (
    MANIFEST,
    MAX_BYTES,
    SHARD_INDEX,
    TOKEN_COUNTS,
    Manifest,
    ShardInfo,
)
from data_prep.formats.shards import wrong_sizes
from data_prep.tokenizers.load import HUGGINGFACE_CONFIG, HUGGINGFACE_FILE
from tidar_common.config import existing_path, parse
from tidar_common.errors import UserError
from tidar_common.files import fsync_path, write_text_atomic, written_atomically


@dataclass(frozen=True)
class DataConfig:
    dir: str | None = None
    """Folder written by tidar-prepare, or a URL of one (https://, s3://, pipe:COMMAND)."""
    cache_dir: str | None = None
    """Folder on the node's disk for the files of a URL."""
    cache_bytes: int | None = None
    """Bytes beyond which the oldest shards leave it; None keeps all."""
    skip_damaged: bool = False
    """Go on without a shard that cannot be read: its sequences come as padding."""
    mix: dict[str, Any] | None = None
    """Several prepared sets, each with a share of the tokens, by name:
    'data.mix={web:{dir:data/web,weight:0.7},code:{dir:data/code,weight:0.3}}'. data.dir then gives
    the tokenizer and the held-out text. A weight may change at steps: {0: 0.9, 20000: 0.5}."""

    def __post_init__(self) -> None:
        if self.cache_bytes is not None and self.cache_bytes < 0:
            raise UserError(f"data.cache_bytes: must be at least 0, got {self.cache_bytes}")


def open_data_dir(cfg: DictConfig) -> Path:
    """The folder that `data.dir` names, or the local one that stands for its URL.

    Raises:
        UserError: when there is no such data, or a URL has no place to be copied to.
    """
    config = parse(DataConfig, cfg.data, "data")
    if config.dir is None or not is_remote(config.dir):
        return existing_path(cfg, "data.dir", "a folder written by tidar-prepare")
    return open_place(config.dir, config, "data.dir")


def open_place(place: str, config: DataConfig, key: str) -> Path:
    """The prepared folder at `place`, a path or a URL that stands under `key` in the config."""
    if not is_remote(place):
        path = Path(place).expanduser()
        if not path.exists():
            raise UserError(
                f"{key}: {path} does not exist; give the path of a folder written by tidar-prepare"
            )
        return path
    if config.cache_dir is None:
        raise UserError(
            f"data.cache_dir: has no value, and {place} has to be copied somewhere; set "
            "data.cache_dir=... to a folder on a disk of the node"
        )
    return mirror(place, Path(config.cache_dir).expanduser())


def check_shards(
    folder: Path, shards: Sequence[ShardInfo], key: str, *, skip_damaged: bool | None = None
) -> str | None:
    """Whether all `shards` are in `folder`, each with its size, so that none is missed after days.

    Contents are not read, and shards behind a URL are not looked at.

    Args:
        folder: a prepared data folder.
        shards: of its manifest.
        key: where the folder stands in the config.
        skip_damaged: `data.skip_damaged`; None where it does not help.

    Returns:
        What a run leaves out that skips damaged shards; None where all are there.

    Raises:
        UserError: naming the first that is not, and the remedy.
    """
    wrong = [] if is_mirror(folder) else wrong_sizes(folder, shards)
    if not wrong:
        return None
    more = f" (and {len(wrong) - 1:,} more of {len(shards):,} shards)" if len(wrong) > 1 else ""
    line = f"{key}: {wrong[0]}{more}"
    if skip_damaged:
        return f"{line}; left out, as data.skip_damaged says"
    other = ", or go on without with data.skip_damaged=true" if skip_damaged is False else ""
    raise UserError(f"{line}; copy it again or run tidar-prepare again{other}")


ORIGIN = "origin.json"
"""In the local folder: where its files come from."""
ATTEMPTS = 5
FIRST_WAIT_S = 1.0
CHUNK_BYTES = 1 << 20
MAX_SIDE_BYTES = 16 << 30
"""Of the tokenizer, the counts and the index, whose sizes the manifest does not say."""


def is_remote(place: str) -> bool:
    """Whether `data.dir` is a URL or a pipe, not a folder."""
    return "://" in place or place.startswith("pipe:")


def is_mirror(folder: Path) -> bool:
    """Whether a local folder stands for data behind a URL, so that shards come when needed."""
    return (folder / ORIGIN).exists()


def mirror(url: str, cache_dir: Path) -> Path:
    """A local folder that stands for the prepared data at `url`, below `cache_dir`.

    Data that was prepared anew at the same place gets another folder.

    Raises:
        UserError: when the data cannot be read, or is not what its manifest says.
    """
    url = url.rstrip("/")
    content = _small_file(f"{url}/{MANIFEST}")
    folder = cache_dir / hashlib.sha256(url.encode() + b"\n" + content).hexdigest()[:16]
    with _locked(folder / ".lock"):
        if not (folder / MANIFEST).exists():
            with written_atomically(folder / MANIFEST) as target:
                target.write(content)
        write_text_atomic(folder / ORIGIN, json.dumps({"url": url}))
        manifest = Manifest.load(folder)
        wanted = {
            manifest.tokenizer.file: manifest.tokenizer.sha256,
            TOKEN_COUNTS: manifest.token_counts_sha256,
            SHARD_INDEX: manifest.shard_index_sha256,
        }
        for name, sha256 in wanted.items():
            _copy(f"{url}/{name}", folder / name, sha256)
        if manifest.tokenizer.file == HUGGINGFACE_FILE:
            _copy(f"{url}/{HUGGINGFACE_CONFIG}", folder / HUGGINGFACE_CONFIG, None)
    return folder


def local_shard(folder: Path, shard: ShardInfo, cache_bytes: int | None = None) -> Path:
    """The shard's file in `folder`, copied there first if the folder stands for remote data.

    Args:
        folder: a data folder.
        shard: which.
        cache_bytes: shards used longest ago are removed beyond this; None keeps all. Where several
            processes share the folder, it holds at least the shard that each of them reads.

    Raises:
        UserError: when it cannot be copied, naming its URL.
    """
    path = folder / shard.name
    if not is_mirror(folder):
        return path
    with _locked(path.with_suffix(".lock")):
        if not path.exists():
            url = json.loads((folder / ORIGIN).read_text())["url"]
            _copy(f"{url}/{shard.name}", path, shard.sha256, shard.bytes)
    os.utime(path)
    if cache_bytes is not None:
        _evict(folder, path, cache_bytes)
    return path


def _copy(url: str, path: Path, sha256: str | None, most: int = MAX_SIDE_BYTES) -> None:
    """Copy a file of at most `most` bytes, all or nothing, its hash checked where it is known."""
    if path.exists():
        return
    for attempt in range(ATTEMPTS):
        digest = hashlib.sha256()
        try:
            with _opened(url) as source, written_atomically(path) as target:
                size = 0
                while chunk := source.read(CHUNK_BYTES):
                    size += len(chunk)
                    if size > most:
                        raise OSError(f"it has more than {most:,} bytes")
                    digest.update(chunk)
                    target.write(chunk)
                if sha256 is not None and digest.hexdigest() != sha256:
                    raise OSError("it differs from what the manifest says")
            return
        except Exception as error:  # stores and commands have exceptions of their own
            _wait_or_raise(url, attempt, error)


def _small_file(url: str) -> bytes:
    for attempt in range(ATTEMPTS):
        try:
            with _opened(url) as source:
                content = source.read(MAX_BYTES + 1)
            if not content:
                raise OSError("it is empty")
            if len(content) > MAX_BYTES:
                raise OSError(f"it has more than the {MAX_BYTES:,} bytes of a manifest")
            return content
        except Exception as error:
            _wait_or_raise(url, attempt, error)
    raise AssertionError("the last attempt returns or raises")


def _wait_or_raise(url: str, attempt: int, error: Exception) -> None:
    reason = " ".join(str(error).split()) or type(error).__name__
    if attempt == ATTEMPTS - 1:
        raise UserError(
            f"data.dir: {url} cannot be read after {ATTEMPTS} attempts ({reason})"
        ) from error
    print(f"{url}: {reason}; trying again", file=sys.stderr, flush=True)
    time.sleep(FIRST_WAIT_S * 2**attempt)


def _opened(url: str) -> IO[bytes]:
    """Through webdataset where it knows the scheme, else through fsspec."""
    from webdataset.gopen import gopen, gopen_schemes

    scheme = url.partition(":")[0]
    if scheme in gopen_schemes:
        return gopen(url, "rb")
    import fsspec

    return fsspec.open(url, "rb").open()


def _evict(folder: Path, kept: Path, cache_bytes: int) -> None:
    files = []
    for path in folder.glob("*/*.tar"):
        try:
            files.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        except FileNotFoundError:
            continue  # another process removed it
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= cache_bytes:
            return
        if path != kept:
            path.unlink(missing_ok=True)
            total -= size


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process of this machine at a time copy a file; the others find it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        with suppress(OSError):  # a file system without locks: a file may be copied twice
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    fsync_path(path.parent)
