"""Read and encode: the parts of a task to documents, and documents to ids."""

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from data_prep.corpora import Document
from data_prep.stages.pack import Piece
from data_prep.stages.plan import Preparation, Task
from data_prep.stages.screen import Removals
from data_prep.tokenizers.load import Tokenizer

HELD_OUT_ALREADY = "held out in an earlier epoch"
BATCH_CHARACTERS = 1_000_000


def read_documents(
    task: Task, preparation: Preparation, refused: Counter[str], filtered: Counter[str]
) -> Iterator[Document]:
    """The task's documents but those that a rule removed; of later epochs only those of the train
    split. The others are counted: `refused` by reason, `filtered` by rule."""
    settings, corpus = preparation.settings, preparation.corpus
    removals = Removals(settings, task)
    # The first epoch before later ones.
    for number in sorted(range(len(task.parts)), key=lambda n: task.parts[n].epoch > 0):
        part = task.parts[number]
        removed = removals.of(number)
        for place, document in enumerate(corpus.documents([part], refused)):
            if place in removed:
                filtered[removed[place]] += 1
            elif part.epoch and settings.split_of(document) != "train":
                refused[HELD_OUT_ALREADY] += 1
            else:
                yield document


def encode_documents(
    documents: Iterable[Document], tokenizer: Tokenizer, encoder: str
) -> Iterator[tuple[Document, Piece]]:
    """Each document and its ids, with the end token unless its text is cut.

    A prompt is encoded apart from the text behind it, as it is when a model is asked to answer it,
    so that no token reaches from one into the other.
    """
    end = np.array([tokenizer.eos_id], dtype=np.int32)
    for batch in _batches(documents):
        texts = [text for document in batch for text in document.pieces]
        encoded = iter(tokenizer.encode_batch(texts, encoder))
        parts: list[NDArray[np.int32]] = []
        lengths: list[tuple[int, int]] = []
        for document in batch:
            prompt = next(encoded) if document.prompt else end[:0]
            text = next(encoded)
            ending = end[:0] if document.cut else end
            parts += [prompt, text, ending]
            lengths.append((len(prompt) + len(text) + len(ending), len(prompt)))
        # All documents in one array: one conversion, and no array of its own for each.
        ids = np.empty(sum(length for length, _ in lengths), dtype=tokenizer.dtype)
        np.concatenate(parts, out=ids, casting="unsafe")
        start = 0
        for document, (length, prompt_length) in zip(batch, lengths, strict=True):
            yield document, Piece(ids[start : start + length], prompt=prompt_length)
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
