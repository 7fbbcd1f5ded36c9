"""What a reader of text is."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.errors import UserError


@dataclass(frozen=True)
class Document:
    """Text with an id that is unique in its corpus and the same at every reading."""

    id: str
    text: str


class Corpus(ABC):
    """Text that can be read more than once, always in the same order."""

    def __init__(self) -> None:
        self.refused: Counter[str] = Counter()
        """Documents left out, by reason; of the latest reading."""

    def documents(self) -> Iterator[Document]:
        """All documents that are not refused; reading streams, memory stays flat."""
        self.refused.clear()
        for document in self.read():
            if document.text:
                yield document
            else:
                self.refused["empty"] += 1

    @abstractmethod
    def read(self) -> Iterator[Document]:
        """Every document; adds to `refused` what it cannot read."""


def files_under(path: Path, patterns: tuple[str, ...], key: str) -> list[Path]:
    """`path` itself if it is a file, else the files below it that match, sorted by name.

    Raises:
        UserError: when there are none.
    """
    if path.is_file():
        return [path]
    found = sorted(p for pattern in patterns for p in path.rglob(pattern) if p.is_file())
    if not found:
        raise UserError(f"{key}: no file matching {' or '.join(patterns)} under {path}")
    return found
