"""The folder that `tidar-prepare` writes: who may write it, what stands in it, what is removed."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data_prep.config import PrepareSettings
from data_prep.formats.manifest import (
    CONTAMINATED,
    MANIFEST,
    SHARD_INDEX,
    SPLITS,
    STATS_PAGE,
    TOKEN_COUNTS,
    Manifest,
)
from data_prep.formats.shards import wrong_sizes
from data_prep.tokenizers.load import HUGGINGFACE_CONFIG, HUGGINGFACE_FILE, SENTENCEPIECE_FILE
from tidar_common.errors import UserError

TASKS_FOLDER = "tasks"
"""What tasks leave until all are put together; see `stages.task`."""
TOKENIZER_FILES = {SENTENCEPIECE_FILE, HUGGINGFACE_FILE, HUGGINGFACE_CONFIG}
KNOWN_NAMES = {
    *SPLITS, MANIFEST, TOKEN_COUNTS, SHARD_INDEX, CONTAMINATED, STATS_PAGE, TASKS_FOLDER,
    *TOKENIZER_FILES,
}  # fmt: skip
"""Everything that a prepared folder, finished or not, may hold beside temporary files."""


@contextmanager
def locked_folder(folder: Path, *, shared: bool) -> Iterator[None]:
    """Make the folder and hold it, so that two preparations never mix; an empty one goes again.
    `shared` holds it together with others, as the jobs of an array do.

    The lock ends with the process. File systems without locks are used without: what is written
    depends on config and text alone and is renamed into place, so two writers of the same thing
    do not harm each other.

    Raises:
        UserError: when it cannot be written, or another process prepares data in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, "Permission denied")
    except OSError as error:
        raise UserError(
            f"output_dir: {folder} cannot be written ({error.strerror}); choose another folder"
        ) from error
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            os.close(descriptor)
            raise UserError(
                f"output_dir: another tidar-prepare writes {folder}; wait for it or choose another"
            ) from error
    try:
        yield
    finally:
        os.close(descriptor)
        for place in (folder / TASKS_FOLDER, folder):
            with suppress(OSError):
                place.rmdir()  # only when nothing was written


@contextmanager
def taking_turns(folder: Path) -> Iterator[None]:
    """Wait until no other job of an array is inside."""
    (folder / TASKS_FOLDER).mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / TASKS_FOLDER, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def is_prepared(settings: PrepareSettings) -> bool:
    """Whether the folder is finished with these settings already.

    Raises:
        UserError: when it holds something else, or was prepared with other settings and
            `overwrite` is off.
    """
    folder = settings.output_dir
    names = {path.name for path in folder.iterdir()}
    foreign = sorted(name for name in names - KNOWN_NAMES if not name.endswith(".writing"))
    if foreign:
        raise UserError(
            f"output_dir: {folder} holds {foreign[0]}, which no preparation writes; choose an "
            "empty or a new folder"
        )
    if MANIFEST not in names or settings.overwrite:
        return False
    manifest = Manifest.load(folder)
    shutil.rmtree(folder / TASKS_FOLDER, ignore_errors=True)  # where the last run ended just before
    if manifest.config_hash != settings.config_hash:
        raise UserError(
            f"output_dir: {folder} was prepared with other settings; choose another folder, or "
            "overwrite=true to replace it"
        )
    # A quick look at every shard; `verify=true` reads them.
    wrong = wrong_sizes(folder, [*manifest.train.shards, *manifest.heldout.shards])
    if wrong:
        raise UserError(f"output_dir: {wrong[0]}; prepare again with overwrite=true")
    return True


def clear_finished(folder: Path) -> None:
    """Remove a finished preparation, which `overwrite=true` replaces; leave an unfinished one,
    which is continued."""
    if not (folder / MANIFEST).exists():
        return
    # The manifest goes first: what is half removed must not look finished.
    (folder / MANIFEST).unlink()
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def remove_leftovers(manifest: Manifest, folder: Path) -> None:
    """Delete what the tasks left, and what an interrupted preparation, perhaps with other settings,
    left behind and this one does not list."""
    kept = {shard.name for split in manifest.splits.values() for shard in split.shards}
    kept |= {MANIFEST, TOKEN_COUNTS, SHARD_INDEX, manifest.tokenizer.file}
    if "contaminated_sha256" in manifest.filters:
        kept.add(CONTAMINATED)
    if manifest.tokenizer.file == HUGGINGFACE_FILE:
        kept.add(HUGGINGFACE_CONFIG)
    shutil.rmtree(folder / TASKS_FOLDER, ignore_errors=True)
    for place in (folder, *(folder / split for split in SPLITS)):
        for path in place.iterdir():
            if path.is_file() and path.relative_to(folder).as_posix() not in kept:
                path.unlink()
