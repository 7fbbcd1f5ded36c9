"""Parquet files: one document a row."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

from data_prep.corpora.base import Corpus, Document, files_under
from data_prep.errors import UserError

BATCH_ROWS = 1024


@dataclass(frozen=True)
class ParquetConfig:
    path: str
    """A file, or a folder whose *.parquet are read."""
    kind: str = "parquet"
    text_field: str = "text"
    id_field: str | None = None
    """Column with the document's id; None makes ids of file name and row number."""


class ParquetCorpus(Corpus):
    """Reads a batch of rows at a time; needs pyarrow, the `parquet` extra. A null is empty text."""

    def __init__(self, config: ParquetConfig) -> None:
        super().__init__()
        self.config = config
        self.path = Path(config.path).expanduser()
        self.files = files_under(self.path, ("*.parquet",), "corpus.path")
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise UserError(
                "corpus=parquet: needs pyarrow; pip install 'tidar-pretrain[parquet]'"
            ) from error

    def read(self) -> Iterator[Document]:
        import pyarrow

        root = self.path if self.path.is_dir() else self.path.parent
        for path in self.files:
            name = path.relative_to(root).as_posix()
            try:
                for row, (text, identity) in enumerate(self._rows(path), 1):
                    default_id, place = f"{name}:{row}", f"{path}: row {row}"
                    yield self._document(text, identity, default_id, place)
            except (OSError, pyarrow.ArrowException) as error:
                raise UserError(f"{path}: cannot be read to its end ({error})") from error

    def _rows(self, path: Path) -> Iterator[tuple[Any, Any]]:
        """Text and id (None without an id column) of every row."""
        import pyarrow.parquet

        columns = [c for c in (self.config.text_field, self.config.id_field) if c]
        with pyarrow.parquet.ParquetFile(path) as file:
            for column in columns:
                if column not in file.schema_arrow.names:
                    raise UserError(
                        f"{path}: has no column {column!r}; set corpus.text_field or "
                        "corpus.id_field"
                    )
            for batch in file.iter_batches(BATCH_ROWS, columns=columns):
                texts, *ids = (batch.column(column).to_pylist() for column in columns)
                yield from zip(texts, ids[0] if ids else repeat(None), strict=False)

    def _document(self, text: Any, identity: Any, default_id: str, place: str) -> Document:
        if text is not None and not isinstance(text, str):
            raise UserError(f"{place}: column {self.config.text_field!r} is not text")
        if self.config.id_field is None:
            identity = default_id
        elif identity is None:
            raise UserError(f"{place}: column {self.config.id_field!r} is null; mend the row")
        return Document(str(identity), text or "")
