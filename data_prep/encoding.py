"""Documents to ids, in several processes when asked, always in the order of the corpus."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain
from multiprocessing import get_context
from pathlib import Path

from data_prep.corpora import Document
from data_prep.tokenizers import Tokenizer, load_tokenizer

BATCH_CHARACTERS = 200_000
QUEUED_BATCHES = 3
"""Batches handed out ahead for each worker; bounds the memory."""


@dataclass(frozen=True)
class Encoded:
    """A tokenised document."""

    id: str
    ids: list[int]
    """Without the end token."""
    text_bytes: int


def encode_documents(
    documents: Iterable[Document], tokenizer: Tokenizer, path: Path, workers: int
) -> Iterator[Encoded]:
    """Encode with the tokenizer, which is also saved at `path`; `workers` processes, 1 uses none.

    Batches come back in the order in which they were handed out, whoever is done first.
    """
    batches = _batches(documents)
    if workers == 1:
        yield from chain.from_iterable(_encode(tokenizer, batch) for batch in batches)
        return
    pending: deque[Future[list[Encoded]]] = deque()
    pool = ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=_start_worker, initargs=(path,)
    )
    with pool:
        for batch in batches:
            pending.append(pool.submit(_work, batch))
            if len(pending) > workers * QUEUED_BATCHES:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()


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


def _encode(tokenizer: Tokenizer, batch: list[Document]) -> list[Encoded]:
    ids = tokenizer.encode_batch([document.text for document in batch])
    return [
        Encoded(document.id, own, len(document.text.encode()))
        for document, own in zip(batch, ids, strict=True)
    ]


_tokenizer: Tokenizer | None = None


def _start_worker(path: Path) -> None:
    global _tokenizer
    _tokenizer = load_tokenizer(path)


def _work(batch: list[Document]) -> list[Encoded]:
    assert _tokenizer is not None, "the pool's initializer loads it"
    return _encode(_tokenizer, batch)
