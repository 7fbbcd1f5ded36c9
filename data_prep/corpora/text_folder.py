"""A folder of text files, one document each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from data_prep.corpora.base import DEFAULT_PART_BYTES, NOT_UTF8, Corpus, Document, Part
from data_prep.corpora.files import File, find_files, open_binary, os_reason, runs_of


@dataclass(frozen=True)
class TextFolderConfig:
    path: str
    """A folder, read with all folders below it, or one file; a path or a URL."""
    kind: str = "text_folder"
    glob: str = "*.txt"
    """Which files; `*` takes all."""


class FilesCorpus(Corpus):
    """A document for every file. Ids are paths relative to the folder. Files that cannot be read
    or are not UTF-8 are refused and counted."""

    def __init__(self, files: Sequence[File]) -> None:
        super().__init__()
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

    def read_part(self, part: Part) -> Iterator[Document]:
        for path, name in zip(part.paths, part.names, strict=True):
            try:
                with open_binary(path) as file:
                    yield Document(name, file.read().decode())
            except UnicodeDecodeError:
                self.refused[NOT_UTF8] += 1
            except OSError as error:
                self.refused[f"not readable ({os_reason(error)})"] += 1


class TextFolderCorpus(FilesCorpus):
    """The files under `config.path` that match `config.glob`."""

    def __init__(self, config: TextFolderConfig) -> None:
        super().__init__(find_files(config.path, (config.glob,), "corpus.path"))
