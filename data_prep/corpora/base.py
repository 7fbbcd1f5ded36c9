"""What a reader of text is."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.errors import UserError

NOT_UTF8 = "not UTF-8"


@dataclass(frozen=True)
class Document:
    """Text and its id, the same at every reading.

    The id decides the split. It should be the document's own; documents that share one share a
    split, nothing else.
    """

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
            if not document.text:
                self.refused["empty"] += 1
            elif not _is_utf8(document.text):
                self.refused[NOT_UTF8] += 1
            else:
                yield document

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
    if not path.exists():
        raise UserError(f"{key}: {path} does not exist; give a file or a folder")
    try:
        found = {p for pattern in patterns for p in path.rglob(pattern) if p.is_file()}
    except (ValueError, RuntimeError) as error:  # the latter for an absolute pattern
        raise UserError(f"{key}: cannot look for {patterns[0]!r} under {path} ({error})") from error
    if not found:
        raise UserError(f"{key}: no file matching {' or '.join(patterns)} under {path}")
    return sorted(found)


def _is_utf8(text: str) -> bool:
    """Whether `text` can be stored: JSON can spell out halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
