"""Documents to ids, in several processes when asked, always in the order of the corpus."""

import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.corpora import Document
from data_prep.tokenizers import Tokenizer
from data_prep.workers import Worker

BATCH_CHARACTERS = 200_000
QUEUED_BATCHES = 3
"""Batches handed out ahead for each worker; bounds the memory."""


@dataclass(frozen=True)
class Encoded:
    """A tokenised document."""

    id: str
    ids: NDArray[np.int32]
    """Without the end token."""
    text_bytes: int


def encode_documents(
    documents: Iterable[Document], tokenizer: Tokenizer, path: Path, workers: int
) -> Generator[Encoded, None, None]:
    """Encode with the tokenizer, which is also saved at `path`; `workers` processes, 1 uses none.

    Batches go round the workers and come back in the same order, whoever is done first. Closing
    the generator, or an exception inside it, ends the workers at once.

    Raises:
        UserError: when a worker process dies.
    """
    # `workers` says how many cores tokenise; the threads of Hugging Face's library would add more.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    batches = _batches(documents)
    if workers == 1:
        for batch in batches:
            yield from _encoded(batch, tokenizer.encode_batch([one.text for one in batch]))
        return
    pool: list[Worker] = []
    pending: deque[tuple[list[Document], Worker]] = deque()
    try:
        pool.extend(Worker(path) for _ in range(workers))
        for number, batch in enumerate(batches):
            worker = pool[number % workers]
            worker.send([document.text for document in batch])
            pending.append((batch, worker))
            if len(pending) > workers * QUEUED_BATCHES:
                first, worker = pending.popleft()
                yield from _encoded(first, worker.receive())
        while pending:
            first, worker = pending.popleft()
            yield from _encoded(first, worker.receive())
    finally:
        for worker in pool:
            worker.stop()


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


def _encoded(batch: list[Document], ids: Iterable[NDArray[np.int32]]) -> Iterator[Encoded]:
    for document, own in zip(batch, ids, strict=True):
        yield Encoded(document.id, own, len(document.text.encode()))
