"""Text files, one document each: those of a folder, or Python's own standard library."""

import os
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.corpora.base import DEFAULT_PART_BYTES, NOT_UTF8, Corpus, Document, Part
from data_prep.corpora.files import File, find_files, local_file, open_binary, os_reason, runs_of
from tidar_common.errors import UserError

SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idle_test",
    "lib2to3",
}
"""Folders that are not the library itself, or hold test data written to be malformed."""


@dataclass(frozen=True)
class TextFolderConfig:
    path: str
    """A folder, read with all folders below it, or one file; a path or a URL."""
    kind: str = "text_folder"
    """Which reader."""
    glob: str = "*.txt *.md"
    """Which files, by patterns with spaces between; "*" takes all."""


class FilesCorpus(Corpus):
    """A document for every file. Ids are paths relative to the folder. Files that cannot be read
    or are not UTF-8 are refused and counted."""

    def __init__(self, files: Sequence[File]) -> None:
        self.files = files

    @property
    def total_bytes(self) -> int:
        return sum(file.size for file in self.files)

    def parts(self, part_bytes: int = DEFAULT_PART_BYTES) -> list[Part]:
        return [
            Part(
                paths=tuple(file.path for file in run),
                names=tuple(file.name for file in run),
                bytes=sum(file.size for file in run),
                stamp=" ".join(file.stamp for file in run),
            )
            for run in runs_of(self.files, part_bytes)
        ]

    def read_part(self, part: Part, refused: Counter[str]) -> Iterator[Document]:
        for path, name in zip(part.paths, part.names, strict=True):
            try:
                with open_binary(path) as file:
                    yield Document(name, file.read().decode())
            except UnicodeDecodeError:
                refused[NOT_UTF8] += 1
            except OSError as error:
                refused[f"not readable ({os_reason(error)})"] += 1


class TextFolderCorpus(FilesCorpus):
    """The files under `config.path` that match `config.glob`."""

    def __init__(self, config: TextFolderConfig) -> None:
        super().__init__(find_files(config.path, config.glob.split() or [""], "corpus.path"))


@dataclass(frozen=True)
class StdlibConfig:
    kind: str = "python_stdlib"
    """Which reader."""
    max_bytes: int | None = None
    """Stop after this many bytes of text; None takes all."""

    def __post_init__(self) -> None:
        if self.max_bytes is not None and self.max_bytes < 1:
            raise UserError(f"corpus.max_bytes: must be at least 1, got {self.max_bytes}")


class StdlibCorpus(FilesCorpus):
    """A document for every module of the running Python's library, in order of path: about 10 MB
    of real text that every machine has."""

    def __init__(self, config: StdlibConfig) -> None:
        root = Path(sysconfig.get_path("stdlib"))
        if not any(root.glob("*.py")):
            raise UserError(
                f"corpus: {root} has no Python sources; use corpus=text_folder corpus.path=..."
            )
        files = (local_file(p, p.relative_to(root).as_posix()) for p in sorted(_modules(root)))
        super().__init__(list(_first_bytes(files, config.max_bytes)))


def _first_bytes(files: Iterable[File], max_bytes: int | None) -> Iterator[File]:
    room = max_bytes
    for file in files:
        if room is not None:
            room -= file.size
            if room < 0:
                return
        yield file


def _modules(root: Path) -> Iterator[Path]:
    """Every source file; what is installed beside the library is not even walked through."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        for name in files:
            if name.endswith(".py"):
                yield Path(folder, name)
