"""Python's own standard library: about 10 MB of real text that every machine has."""

import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.corpora.files import File, local_file
from data_prep.corpora.text_folder import FilesCorpus
from tidar_common.errors import UserError

LEFT_OUT = {
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
class StdlibConfig:
    kind: str = "python_stdlib"
    max_bytes: int | None = None
    """Stop after this much text; None takes all of it."""

    def __post_init__(self) -> None:
        if self.max_bytes is not None and self.max_bytes < 1:
            raise UserError(f"corpus.max_bytes: must be at least 1, got {self.max_bytes}")


class StdlibCorpus(FilesCorpus):
    """A document for every module of the running Python's library, in order of path."""

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
        subfolders[:] = [name for name in subfolders if name not in LEFT_OUT]
        for name in files:
            if name.endswith(".py"):
                yield Path(folder, name)
