"""What a reader of text is: parts that can be read one by one, and the documents in each."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from data_prep.corpora.files import File
from tidar_common.config import config_hash

NOT_UTF8 = "not UTF-8"
DEFAULT_PART_BYTES = 4_000_000
Counts = Callable[[Sequence[str]], int]
"""Tokens of some texts."""


@dataclass(frozen=True)
class Document:
    """Text and its id, the same at every reading.

    The id decides the split. It should be the document's own; documents that share one share a
    split, nothing else.
    """

    id: str
    text: str
    source: str = ""
    """The corpus it comes from, where several are mixed."""
    prompt: str = ""
    """What stands before `text` and need not be learnt, where the corpus tells the two apart."""
    cut: bool = False
    """Whether the text breaks off where its author did not end: no end token stands behind it."""
    split: str = ""
    """`train` or `heldout` where the corpus decides; by the id where it does not."""

    @property
    def pieces(self) -> tuple[str, ...]:
        """What is encoded by itself: the text, behind its prompt if it has one."""
        return (self.prompt, self.text) if self.prompt else (self.text,)

    @property
    def whole(self) -> str:
        """Prompt and text."""
        return self.prompt + self.text


@dataclass(frozen=True)
class Part:
    """Some of a corpus, readable without the rest: a few files, or a span of one."""

    paths: tuple[str, ...]
    names: tuple[str, ...]
    """Of each path, relative to the corpus."""
    bytes: int
    """About how much text, before it is read."""
    stamp: str
    """Changes when one of the files does."""
    start: int = 0
    """First byte or row of the span; what is counted is the reader's own affair."""
    end: int | None = None
    """Where the span ends; None at the file's end."""
    source: str = ""
    epoch: int = 0
    """Above 0 in a mix that reads a corpus more than once."""
    split: str = ""
    """Of all its documents; empty where each one's id decides."""


class Corpus(ABC):
    """Text that can be read more than once, always in the same order, all of it or by parts.

    A corpus travels to other processes: it holds its config and a list of files, nothing open.
    """

    files: Sequence[File] = ()

    def documents(
        self, parts: Iterable[Part] | None = None, refused: Counter[str] | None = None
    ) -> Iterator[Document]:
        """The documents of `parts`, by default all, but those that are refused; reading streams,
        memory stays flat.

        Args:
            parts: of this corpus.
            refused: counts the documents that are left out, by reason, as they are met.
        """
        counts = Counter() if refused is None else refused
        for part in self.parts() if parts is None else parts:
            for document in self.read_part(part, counts):
                if not document.text:
                    counts["empty"] += 1
                elif not _is_utf8(document.whole):
                    counts[NOT_UTF8] += 1
                elif part.source or part.split:
                    yield replace(document, source=part.source, split=part.split)
                else:
                    yield document

    def listing(self) -> list[tuple[str, int]]:
        """Name and size of every file."""
        return [(file.name, file.size) for file in self.files]

    def described(self) -> dict[str, Any]:
        """What a manifest keeps of it: by this a change shows without anything being read."""
        listing = self.listing()
        size = sum(size for _, size in listing)
        return {"files": len(listing), "bytes": size, "sha256": config_hash(listing)}

    def weigh(self, count_tokens: Counts) -> None:  # noqa: B027
        """Prepare for `parts` where they depend on tokens: a mix measures its sources."""

    @property
    def has_prompts(self) -> bool:
        """Whether documents may come with a prompt."""
        return False

    @property
    @abstractmethod
    def total_bytes(self) -> int:
        """About how much text there is, before it is read."""

    @abstractmethod
    def parts(self, part_bytes: int = DEFAULT_PART_BYTES) -> list[Part]:
        """The corpus in pieces of about `part_bytes`, in order; together they are all of it."""

    @abstractmethod
    def read_part(self, part: Part, refused: Counter[str]) -> Iterator[Document]:
        """Every document of one part; adds to `refused` what it cannot read."""


def utf8_bytes(text: str) -> int:
    """Length of `text` in UTF-8; Python knows of each text whether it is ASCII."""
    return len(text) if text.isascii() else len(text.encode())


def _is_utf8(text: str) -> bool:
    """Whether `text` can be stored: JSON can spell out halves of surrogate pairs."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
