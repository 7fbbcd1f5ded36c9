"""JSON lines, plain or compressed (gzip, Zstandard): one document a line."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from data_prep.corpora.base import Corpus, Document, files_under
from data_prep.errors import UserError

PATTERNS = ("*.jsonl", "*.jsonl.gz", "*.jsonl.zst")


@dataclass(frozen=True)
class JsonlConfig:
    path: str
    """A file, or a folder whose *.jsonl, *.jsonl.gz and *.jsonl.zst are read."""
    kind: str = "jsonl"
    text_field: str = "text"
    id_field: str | None = None
    """Field with the document's id; None makes ids of file name and line number."""


class JsonlCorpus(Corpus):
    """A broken line or a missing field stops the preparation: it is named with file and line."""

    def __init__(self, config: JsonlConfig) -> None:
        super().__init__()
        self.config = config
        self.path = Path(config.path).expanduser()
        self.files = files_under(self.path, PATTERNS, "corpus.path")

    def read(self) -> Iterator[Document]:
        root = self.path if self.path.is_dir() else self.path.parent
        for path in self.files:
            name = path.relative_to(root).as_posix()
            try:
                with _open(path) as file:
                    for number, line in enumerate(file, 1):
                        if line.strip():
                            yield self._document(line, f"{name}:{number}", f"{path}:{number}")
            except (OSError, EOFError, zlib.error) as error:
                raise UserError(f"{path}: cannot be read to its end ({error})") from error

    def _document(self, line: bytes, default_id: str, place: str) -> Document:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # malformed JSON and malformed UTF-8 alike
            raise UserError(f"{place}: not JSON ({error}); mend or remove the line") from error
        fields = self.config
        for field in filter(None, (fields.text_field, fields.id_field)):
            if not isinstance(record, dict) or field not in record:
                raise UserError(
                    f"{place}: has no field {field!r}; set corpus.text_field or corpus.id_field"
                )
        text = record[fields.text_field]
        if not isinstance(text, str):
            raise UserError(f"{place}: field {fields.text_field!r} is not text")
        identity = record[fields.id_field] if fields.id_field else default_id
        if identity is None:
            raise UserError(f"{place}: field {fields.id_field!r} is null; mend or remove the line")
        return Document(str(identity), text)


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix != ".zst":
        return path.open("rb")
    try:
        import pyarrow
    except ImportError as error:
        raise UserError(
            f"{path}: needs pyarrow to be read; pip install 'tidar-pretrain[parquet]'"
        ) from error
    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
