"""Parquet files: one document a row."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data_prep.corpora.base import DEFAULT_PART_BYTES, Corpus, Document, Part
from data_prep.corpora.files import find_files, needed, open_binary, spans_of
from tidar_common.errors import UserError

BATCH_ROWS = 1024


@dataclass(frozen=True)
class ParquetConfig:
    path: str
    """A file, or a folder whose *.parquet are read; a path or a URL."""
    kind: str = "parquet"
    """Which reader."""
    text_field: str = "text"
    """Column with the document's text."""
    id_field: str | None = None
    """Column with the document's id, which decides its split; None makes ids of file name and row
    number."""
    prompt_field: str | None = None
    """Column with a prompt that the text answers, for layout.loss_span=response; None has none."""


KEYS = ("text_field", "id_field", "prompt_field")


def row_document(row: dict[str, Any], default_id: str, place: str, config: Any) -> Document:
    """A document of a table's row, of which `config` names the columns. A null is empty text.

    Raises:
        UserError: naming the row, when the text is not text or the id is null.
    """
    for column in filter(None, (config.text_field, config.prompt_field)):
        if not isinstance(row[column], str | None):
            raise UserError(f"{place}: column {column!r} is not text")
    identity = row[config.id_field] if config.id_field else default_id
    if identity is None:
        raise UserError(f"{place}: column {config.id_field!r} is null; mend the row")
    prompt = row[config.prompt_field] if config.prompt_field else None
    return Document(str(identity), row[config.text_field] or "", prompt=prompt or "")


def check_columns(path: str, names: list[str], config: Any) -> list[str]:
    """The columns to read; raises UserError naming the first that `names` lacks."""
    columns = []
    for key in KEYS:
        column = getattr(config, key)
        if column and column not in names:
            raise UserError(f"{path}: has no column {column!r}; set corpus.{key}")
        if column and column not in columns:
            columns.append(column)
    return columns


class ParquetCorpus(Corpus):
    """A part is a run of row groups, read a batch of rows at a time; needs pyarrow, the `parquet`
    extra. A null is empty text."""

    def __init__(self, config: ParquetConfig) -> None:
        self.config = config
        self.files = find_files(config.path, ("*.parquet",), "corpus.path")
        needed("pyarrow.parquet", "corpus=parquet", "parquet")

    @property
    def has_prompts(self) -> bool:
        return self.config.prompt_field is not None

    @property
    def total_bytes(self) -> int:
        return sum(file.size for file in self.files)

    def parts(self, part_bytes: int = DEFAULT_PART_BYTES) -> list[Part]:
        import pyarrow.parquet

        pieces = []
        for file in self.files:
            place = ((file.path,), (file.name,))
            try:
                with open_binary(file.path) as source, pyarrow.parquet.ParquetFile(source) as table:
                    sizes = [
                        table.metadata.row_group(n).total_byte_size
                        for n in range(table.num_row_groups)
                    ]
            except (OSError, pyarrow.ArrowException) as error:
                raise UserError(f"{file.path}: cannot be read to its end ({error})") from error
            pieces += [
                Part(*place, size, file.stamp, first, end)
                for first, end, size in spans_of(sizes, part_bytes)
            ]
        return pieces

    def read_part(self, part: Part, refused: Counter[str]) -> Iterator[Document]:
        import pyarrow

        (path,), (name,) = part.paths, part.names
        try:
            for number, row in self._rows(path, part.start, part.end):
                place = f"{path}: row {number}"
                yield row_document(row, f"{name}:{number}", place, self.config)
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{path}: cannot be read to its end ({error})") from error

    def _rows(
        self, path: str, first: int, last: int | None
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Row number from 1 and columns of the rows of a span of row groups."""
        import pyarrow.parquet

        with open_binary(path) as source, pyarrow.parquet.ParquetFile(source) as file:
            columns = check_columns(path, file.schema_arrow.names, self.config)
            counts = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
            number = 1 + sum(counts[:first])
            groups = list(range(first, len(counts) if last is None else last))
            for batch in file.iter_batches(BATCH_ROWS, row_groups=groups, columns=columns):
                for row in batch.to_pylist():
                    yield number, row
                    number += 1
