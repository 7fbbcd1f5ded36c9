"""A folder of text files, one document each."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.corpora.base import NOT_UTF8, Corpus, Document, files_under


@dataclass(frozen=True)
class TextFolderConfig:
    path: str
    """A folder, read with all folders below it, or one file."""
    kind: str = "text_folder"
    glob: str = "*.txt"
    """Which files; `*` takes all."""


class TextFolderCorpus(Corpus):
    """Ids are paths relative to the folder. Files that cannot be read or are not
    UTF-8 are refused and counted."""

    def __init__(self, config: TextFolderConfig) -> None:
        super().__init__()
        self.path = Path(config.path).expanduser()
        self.files = files_under(self.path, (config.glob,), "corpus.path")

    def read(self) -> Iterator[Document]:
        root = self.path if self.path.is_dir() else self.path.parent
        for path in self.files:
            try:
                yield Document(path.relative_to(root).as_posix(), path.read_bytes().decode())
            except UnicodeDecodeError:
                self.refused[NOT_UTF8] += 1
            except OSError as error:
                self.refused[f"not readable ({error.strerror})"] += 1
