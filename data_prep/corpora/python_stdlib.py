"""Python's own standard library: about 10 MB of real text that every machine has."""

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.corpora.base import Corpus, Document
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
        for path in sorted(self.root.rglob("*.py")):
            name = path.relative_to(self.root)
            if LEFT_OUT & set(name.parts):
                continue
            content = path.read_bytes()
            if room is not None:
                room -= len(content)
                if room < 0:
                    return
            try:
                yield Document(name.as_posix(), content.decode())
            except UnicodeDecodeError:
                self.refused["not UTF-8"] += 1
