"""Folders that Hugging Face `datasets` saved to disk: Arrow streams, one document a row."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data_prep.corpora.base import DEFAULT_PART_BYTES, Corpus, Document, Part
from data_prep.corpora.files import File, find_files, is_url, needed, open_binary, spans_of
from data_prep.corpora.parquet import check_columns, row_document
from tidar_common.errors import UserError


@dataclass(frozen=True)
class ArrowConfig:
    path: str
    """The folder, with one split or several, or one *.arrow file."""
    kind: str = "arrow"
    """Which reader."""
    text_field: str = "text"
    """Column with the document's text."""
    id_field: str | None = None
    """Column with the document's id, which decides its split; None makes ids of file name and row
    number."""
    prompt_field: str | None = None
    """Column with a prompt that the text answers, for layout.loss_span=response; None has none."""


class ArrowCorpus(Corpus):
    """A part is a run of record batches; needs pyarrow, the `parquet` extra. A null is empty text.

    `cache-*.arrow`, which `datasets` leaves behind in such folders, are not part of the data.
    """

    def __init__(self, config: ArrowConfig) -> None:
        self.config = config
        below = find_files(config.path, ("*.arrow",), "corpus.path")
        self.files = [f for f in below if not f.name.rpartition("/")[2].startswith("cache-")]
        if not self.files:
            raise UserError(f"corpus.path: {config.path} holds nothing but caches of datasets")
        needed("pyarrow", "corpus=arrow", "parquet")

    @property
    def has_prompts(self) -> bool:
        return self.config.prompt_field is not None

    @property
    def total_bytes(self) -> int:
        return sum(file.size for file in self.files)

    def parts(self, part_bytes: int = DEFAULT_PART_BYTES) -> list[Part]:
        pieces = []
        for file in self.files:
            place = ((file.path,), (file.name,))
            if file.size <= part_bytes or is_url(file.path):
                pieces.append(Part(*place, file.size, file.stamp))
                continue
            pieces += [
                Part(*place, size, file.stamp, first, end)
                for first, end, size in spans_of(self._batch_sizes(file), part_bytes)
            ]
        return pieces

    def read_part(self, part: Part, refused: Counter[str]) -> Iterator[Document]:
        import pyarrow

        (path,), (name,) = part.paths, part.names
        row = 0
        try:
            for number, batch in enumerate(_batches(path)):
                if number >= part.start and (part.end is None or number < part.end):
                    columns = check_columns(path, batch.schema.names, self.config)
                    rows = batch.select(columns).to_pylist()
                    for row_number, values in enumerate(rows, row + 1):
                        place = f"{path}: row {row_number}"
                        yield row_document(values, f"{name}:{row_number}", place, self.config)
                row += batch.num_rows
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{path}: cannot be read to its end ({error})") from error

    def _batch_sizes(self, file: File) -> Iterator[int]:
        import pyarrow

        try:
            for batch in _batches(file.path):
                yield batch.nbytes
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{file.path}: cannot be read to its end ({error})") from error


def _batches(path: str) -> Iterator[Any]:
    """The record batches of a stream. A local file is mapped, so those passed over cost nothing."""
    import pyarrow

    with open_binary(path) if is_url(path) else pyarrow.memory_map(path) as source:
        yield from pyarrow.ipc.open_stream(source)
