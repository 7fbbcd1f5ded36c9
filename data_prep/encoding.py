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
    prompt_tokens: int = 0
    """How many of the ids, at the start, are the prompt's."""


def encode_documents(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[Encoded]:
    """What `tokenizer` makes of each document, in the same order.

    A prompt is encoded apart from the text behind it, as it is when a model is asked to answer it,
    so that no token reaches from one into the other.
    """
    for batch in _batches(documents):
        pieces = [piece for document in batch for piece in document.pieces]
        encoded = iter(tokenizer.encode_batch(pieces))
        for document in batch:
            size = utf8_bytes(document.whole)
            prompt = next(encoded) if document.prompt else None
            ids = next(encoded)
            if prompt is None:
                yield Encoded(document.id, ids, size, document.source)
            else:
                both = np.concatenate((prompt, ids))
                yield Encoded(document.id, both, size, document.source, len(prompt))


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.whole)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
