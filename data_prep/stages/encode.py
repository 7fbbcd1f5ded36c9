"""Documents to ids, a batch at a time."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.corpora import Document, utf8_bytes
from data_prep.tokenizers.load import Tokenizer

BATCH_CHARACTERS = 1_000_000


class Encoded(NamedTuple):
    """A tokenised document."""

    id: str
    ids: NDArray[np.unsignedinteger]
    """With the end token, unless its text is cut; a view of the ids of its batch, in the
    tokenizer's dtype."""
    text_bytes: int
    source: str = ""
    prompt_tokens: int = 0
    """How many of the ids, at the start, are the prompt's."""


def encode_documents(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[Encoded]:
    """What `tokenizer` makes of each document, in the same order.

    A prompt is encoded apart from the text behind it, as it is when a model is asked to answer it,
    so that no token reaches from one into the other.
    """
    end = np.array([tokenizer.eos_id], dtype=np.int32)
    nothing = end[:0]
    for batch in _batches(documents):
        encoded = iter(tokenizer.encode_batch([p for document in batch for p in document.pieces]))
        parts: list[NDArray[np.int32]] = []
        lengths: list[tuple[int, int]] = []
        for document in batch:
            prompt = [next(encoded)] if document.prompt else []
            own = [*prompt, next(encoded), nothing if document.cut else end]
            parts += own
            lengths.append((sum(map(len, own)), sum(map(len, prompt))))
        # All documents in one array: one conversion, and no array of its own for each.
        ids = np.empty(sum(length for length, _ in lengths), dtype=tokenizer.dtype)
        np.concatenate(parts, out=ids, casting="unsafe")
        start = 0
        for document, (length, prompt_tokens) in zip(batch, lengths, strict=True):
            own_ids = ids[start : start + length]
            size = utf8_bytes(document.whole)
            yield Encoded(document.id, own_ids, size, document.source, prompt_tokens)
            start += length


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
