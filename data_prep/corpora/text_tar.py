"""Tars of text as webdataset has them: files that share a name up to the first dot are a sample."""

import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from data_prep.corpora.base import DEFAULT_PART_BYTES, NOT_UTF8, Corpus, Document, Part
from data_prep.corpora.files import find_files, open_binary
from tidar_common.errors import UserError

PATTERNS = ("*.tar", "*.tar.gz", "*.tgz")


@dataclass(frozen=True)
class TextTarConfig:
    path: str
    """A file, or a folder whose *.tar, *.tar.gz and *.tgz are read; a path or a URL."""
    kind: str = "webdataset"
    """Which reader."""
    member: str = "txt"
    """What follows the first dot in the name of the member with the text."""
    text_field: str | None = None
    """Field with the text, where that member is JSON; None takes the member as the text."""


class TextTarCorpus(Corpus):
    """A document for every sample, read as a stream. Its id is the name of the tar and the
    sample's key. A part is a tar. Samples without the member, and text that is not UTF-8, are
    refused and counted."""

    def __init__(self, config: TextTarConfig) -> None:
        self.config = config
        self.files = find_files(config.path, PATTERNS, "corpus.path")

    @property
    def total_bytes(self) -> int:
        return sum(file.size for file in self.files)

    def parts(self, part_bytes: int = DEFAULT_PART_BYTES) -> list[Part]:
        return [Part((f.path,), (f.name,), f.size, f.stamp) for f in self.files]

    def read_part(self, part: Part, refused: Counter[str]) -> Iterator[Document]:
        (path,), (name,) = part.paths, part.names
        missing = f"no member {self.config.member}"
        last: str | None = None
        has_text = True
        try:
            with open_binary(path) as raw, tarfile.open(fileobj=raw, mode="r|*") as tar:
                for member in tar:
                    if member.isdir():
                        continue
                    if odd := _odd(member):
                        refused[odd] += 1
                        continue
                    folder, slash, base = member.name.rpartition("/")
                    stem, _, extension = base.partition(".")
                    key = folder + slash + stem
                    if key != last:
                        if not has_text:
                            refused[missing] += 1
                        last, has_text = key, False
                    if extension == self.config.member:
                        has_text = True
                        content = tar.extractfile(member)
                        assert content is not None, "it is a file"
                        yield from self._document(content.read(), f"{name}:{key}", path, refused)
                if not has_text:
                    refused[missing] += 1
        except (OSError, EOFError, tarfile.TarError) as error:
            raise UserError(f"{path}: cannot be read to its end ({error})") from error

    def _document(
        self, content: bytes, identity: str, path: str, refused: Counter[str]
    ) -> Iterator[Document]:
        try:
            text = content.decode()
        except UnicodeDecodeError:
            refused[NOT_UTF8] += 1
            return
        field = self.config.text_field
        if field is not None:
            try:
                text = json.loads(text)[field]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise UserError(
                    f"{path}: sample {identity}: no JSON with a field {field!r} ({error}); set "
                    "corpus.text_field"
                ) from error
            if not isinstance(text, str):
                raise UserError(f"{path}: sample {identity}: field {field!r} is not text")
        yield Document(identity, text)


def _odd(member: tarfile.TarInfo) -> str | None:
    """Why a member is refused: nothing is ever unpacked, but what is odd is nobody's text."""
    if not member.isreg() or member.issparse():
        return "link or device"
    parts = member.name.split("/")
    if member.name.startswith("/") or ".." in parts or not member.name.isprintable():
        return "odd member name"
    return None
