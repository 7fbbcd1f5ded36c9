"""Python's own standard library: about 10 MB of real text that every machine has."""

import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.corpora.base import NOT_UTF8, Corpus, Document
from data_prep.errors import UserError

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


class StdlibCorpus(Corpus):
    """A document for every module of the running Python's library, in order of path."""

    def __init__(self, config: StdlibConfig) -> None:
        super().__init__()
        self.config = config
        self.root = Path(sysconfig.get_path("stdlib"))
        if not any(self.root.glob("*.py")):
            raise UserError(
                f"corpus: {self.root} has no Python sources; use corpus=text_folder corpus.path=..."
            )

    def read(self) -> Iterator[Document]:
        room = self.config.max_bytes
        for path in sorted(self._modules()):
            try:
                content = path.read_bytes()
            except OSError as error:
                self.refused[f"not readable ({error.strerror})"] += 1
                continue
            if room is not None:
                room -= len(content)
                if room < 0:
                    return
            try:
                yield Document(path.relative_to(self.root).as_posix(), content.decode())
            except UnicodeDecodeError:
                self.refused[NOT_UTF8] += 1

    def _modules(self) -> Iterator[Path]:
        """Every source file; what is installed beside the library is not even walked through."""
        for folder, subfolders, files in os.walk(self.root):
            subfolders[:] = [name for name in subfolders if name not in LEFT_OUT]
            for name in files:
                if name.endswith(".py"):
                    yield Path(folder, name)
