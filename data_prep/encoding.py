"""Documents to ids, a batch at a time."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_prep.corpora import Document, utf8_bytes
from data_prep.tokenizers import Tokenizer

BATCH_CHARACTERS = 200_000


@dataclass(frozen=True)
class Encoded:
    """A tokenised document."""

    id: str
    ids: NDArray[np.int32]
    """Without the end token."""
    text_bytes: int
    source: str = ""


def encode_documents(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[Encoded]:
    """What `tokenizer` makes of each document, in the same order."""
    for batch in _batches(documents):
        encoded = tokenizer.encode_batch([document.text for document in batch])
        for document, ids in zip(batch, encoded, strict=True):
            yield Encoded(document.id, ids, utf8_bytes(document.text), document.source)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
