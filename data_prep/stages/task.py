"""One task: its documents read, screened, encoded, packed, written, with a record.

What a task leaves stands in `tasks/` of the output folder until all are put together: shards of
the train split, and a file with what is packed later across tasks (held-out documents, and
the rests that did not fill a sequence). Its record is written last; without one nothing of it
counts.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.corpora import Document, utf8_bytes
from data_prep.formats.manifest import SPLITS, ShardInfo
from data_prep.stages.output_folder import TASKS_FOLDER
from data_prep.stages.pack import Piece
from data_prep.stages.plan import Preparation, Task
from data_prep.stages.screen import Removals
from data_prep.stages.workers import BatchedReport, Report
from data_prep.stages.write import SplitWriter, Written
from data_prep.tokenizers.load import Tokenizer
from tidar_common.files import write_text_atomic, written_atomically


@dataclass
class Count:
    """Documents that were packed."""

    documents: int = 0
    text_bytes: int = 0
    tokens: int = 0
    """With end tokens."""

    def add(self, documents: int, text_bytes: int, tokens: int) -> None:
        self.documents += documents
        self.text_bytes += text_bytes
        self.tokens += tokens


@dataclass
class Counts:
    """Where the documents of one task, or of all of them, went."""

    splits: dict[str, Count] = field(default_factory=lambda: {name: Count() for name in SPLITS})
    sources: dict[str, Count] = field(default_factory=dict)
    """Of each corpus in a mix."""
    refused: Counter[str] = field(default_factory=Counter)
    """By reason."""
    filtered: Counter[str] = field(default_factory=Counter)
    """By rule."""

    def add(self, other: "Counts") -> None:
        for name, count in other.splits.items():
            self.splits[name].add(**vars(count))
        for name, count in sorted(other.sources.items()):
            self.sources.setdefault(name, Count()).add(**vars(count))
        self.refused.update(other.refused)
        self.filtered.update(other.filtered)


@dataclass
class Record:
    """What a finished task says of itself."""

    key: str
    train: Written
    counts: Counts


def run_task(task: Task, preparation: Preparation, report: Report) -> None:
    """Do one task and record it; raises UserError for what is wrong with the text."""
    settings, tokenizer = preparation.settings, preparation.tokenizer
    folder = settings.output_dir / TASKS_FOLDER
    counts, progress = Counts(), BatchedReport(report)
    writer = SplitWriter(settings, "train", tokenizer, task.number)
    held_out: list[Piece] = []
    documents = read_documents(task, preparation, counts.refused, counts.filtered)
    for document, piece in encode_documents(documents, tokenizer, preparation.encoder):
        size = 1, utf8_bytes(document.whole), len(piece.ids)
        split = settings.split_of(document)
        counts.splits[split].add(*size)
        if document.source:
            counts.sources.setdefault(document.source, Count()).add(*size)
        progress.add(*size)
        if split == "train":
            writer.add(piece)
        else:
            held_out.append(piece)
    progress.flush()
    written, rests = writer.finish(folder, f"{task.number:06d}-", keep_rests=True)
    pieces = {"train": rests, "heldout": held_out}
    _save_rests(rests_path(folder, task), pieces, writer.token_counts, tokenizer.dtype)
    record = Record(task.key, written, counts)
    write_text_atomic(record_path(folder, task), json.dumps(record, default=vars))


def record_path(folder: Path, task: Task) -> Path:
    return folder / f"{task.number:06d}.json"


def rests_path(folder: Path, task: Task) -> Path:
    return folder / f"{task.number:06d}.rests"


def load_record(folder: Path, task: Task, moved: Callable[[ShardInfo], bool]) -> Record | None:
    """The record of a task, if it was finished with just this input, config and tokenizer.

    `moved` says whether a shard that is not in `folder` stands where it goes at the end.
    """
    try:
        values: dict[str, Any] = json.loads(record_path(folder, task).read_text())
        if values["key"] != task.key or not rests_path(folder, task).is_file():
            return None
        written, counts = values["train"], values["counts"]
        shards = [ShardInfo(**shard) for shard in written["shards"]]
        record = Record(
            key=values["key"],
            train=Written(**{**written, "shards": shards}),
            counts=Counts(
                splits={name: Count(**count) for name, count in counts["splits"].items()},
                sources={name: Count(**count) for name, count in counts["sources"].items()},
                refused=Counter(counts["refused"]),
                filtered=Counter(counts["filtered"]),
            ),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    for shard in shards:
        path = folder / shard.name
        there = path.is_file() and path.stat().st_size == shard.bytes
        if not there and not moved(shard):
            return None
    return record


def _save_rests(
    path: Path, rests: dict[str, list[Piece]], token_counts: NDArray[np.int64],
    dtype: np.dtype[np.unsignedinteger],
) -> None:  # fmt: skip
    """Arrays one behind another, as `load_rests` reads them: an archive of them takes longer to
    make than the shard of a small task."""
    arrays: list[NDArray[Any]] = [token_counts]
    for split in SPLITS:
        pieces = rests[split]
        empty = np.zeros(0, dtype=dtype)
        arrays.append(np.concatenate([empty, *(piece.ids for piece in pieces)]))
        marks = [(len(piece.ids), piece.continued, piece.prompt) for piece in pieces]
        arrays.append(np.array(marks, dtype=np.int64).reshape(-1, 3))
    with written_atomically(path, sync_folder=False) as file:  # the record, next, syncs it
        for array in arrays:
            np.save(file, array, allow_pickle=False)


def load_rests(folder: Path, task: Task) -> tuple[dict[str, Iterable[Piece]], NDArray[np.int64]]:
    """What a finished task left to be packed, by split, and its count of each id."""
    rests: dict[str, Iterable[Piece]] = {}
    with rests_path(folder, task).open("rb") as file:
        token_counts, *arrays = (
            np.load(file, allow_pickle=False) for _ in range(1 + 2 * len(SPLITS))
        )
    for split, ids, marks in zip(SPLITS, arrays[::2], arrays[1::2], strict=True):
        parts = np.split(ids, np.cumsum(marks[:, 0]))[:-1]
        rests[split] = [
            Piece(part, bool(continued), prompt)
            for part, (_, continued, prompt) in zip(parts, marks.tolist(), strict=True)
        ]
    return rests, token_counts


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
