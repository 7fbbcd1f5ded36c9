"""Parquet files: one document a row."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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
    """Reads a row group's columns at a time; needs the `parquet` extra (pyarrow)."""

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
        import pyarrow.parquet

        root = self.path if self.path.is_dir() else self.path.parent
        columns = [c for c in (self.config.text_field, self.config.id_field) if c]
        for path in self.files:
            name = path.relative_to(root).as_posix()
            try:
                file = pyarrow.parquet.ParquetFile(path)
            except (OSError, pyarrow.ArrowInvalid) as error:
                raise UserError(f"{path}: not a parquet file ({error})") from error
            for column in columns:
                if column not in file.schema_arrow.names:
                    raise UserError(
                        f"{path}: has no column {column!r}; set corpus.text_field or "
                        "corpus.id_field"
                    )
            row = 0
            for batch in file.iter_batches(BATCH_ROWS, columns=columns):
                values = batch.to_pydict()
                texts = values[self.config.text_field]
                ids = values[self.config.id_field] if self.config.id_field else None
                for index, text in enumerate(texts):
                    row += 1
                    identity = str(ids[index]) if ids else f"{name}:{row}"
                    yield Document(identity, text or "")
