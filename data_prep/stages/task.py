"""One task: its documents read, tokenised, packed, and left in the output folder with a record.

What a task leaves stands in `tasks/` of the output folder until all are put together: shards of
the train split, and a file with what is packed later across tasks (held-out documents, and
the rests that did not fill a sequence). Its record is written last; without one nothing of it
counts.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.corpora import Corpus, Document
from data_prep.filters.screening import Removals
from data_prep.formats.manifest import SPLITS, ShardInfo
from data_prep.layout import RESPONSE
from data_prep.settings import PrepareSettings
from data_prep.stages.encode import encode_documents
from data_prep.stages.pack import Piece
from data_prep.stages.plan import Task
from data_prep.stages.write import SplitWriter, Written
from data_prep.tokenizers.load import Tokenizer
from tidar_common.files import write_text_atomic, written_atomically

FOLDER = "tasks"
HELD_OUT_ALREADY = "held out in an earlier epoch"
Report = Callable[[int, int, int], None]
"""Called with documents, text bytes and tokens done since the last call."""
REPORT_EVERY_DOCUMENTS = 500


@dataclass
class Count:
    """Documents that were packed."""

    documents: int = 0
    text_bytes: int = 0
    tokens: int = 0
    """With end tokens."""

    def add_document(self, text_bytes: int, tokens: int) -> None:
        self.documents += 1
        self.text_bytes += text_bytes
        self.tokens += tokens

    def add(self, other: "Count") -> None:
        self.documents += other.documents
        self.text_bytes += other.text_bytes
        self.tokens += other.tokens


@dataclass
class Record:
    """What a finished task says of itself."""

    key: str
    train: Written
    counts: dict[str, Count] = field(default_factory=lambda: {name: Count() for name in SPLITS})
    """By split."""
    sources: dict[str, Count] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    filtered: dict[str, int] = field(default_factory=dict)
    """Documents that a rule removed, by rule."""


@dataclass
class LeftOut:
    """Documents that are not packed."""

    refused: Counter[str] = field(default_factory=Counter)
    """By reason."""
    filtered: Counter[str] = field(default_factory=Counter)
    """By rule."""


def run_task(
    task: Task, settings: PrepareSettings, corpus: Corpus, tokenizer: Tokenizer, report: Report
) -> None:
    """Do one task and record it; raises UserError for what is wrong with the text."""
    folder = settings.output_dir / FOLDER
    record = Record(task.key, Written())
    writer = SplitWriter(settings, "train", tokenizer, task.number)
    held_out: list[Piece] = []
    left_out = LeftOut()
    for split, piece in _pieces(task, settings, corpus, tokenizer, record, left_out, report):
        if split == "train":
            writer.add(piece)
        else:
            held_out.append(piece)
    prefix = f"{task.number:06d}-"
    record.train, rests = writer.finish(folder, prefix, keep_rests=True)
    record.refused = dict(sorted(left_out.refused.items()))
    record.filtered = dict(sorted(left_out.filtered.items()))
    pieces = {"train": rests, "heldout": held_out}
    _save_rests(rests_path(folder, task), pieces, writer.token_counts, tokenizer)
    write_text_atomic(record_path(folder, task), json.dumps(asdict(record)))


def _pieces(
    task: Task, settings: PrepareSettings, corpus: Corpus, tokenizer: Tokenizer,
    record: Record, left_out: LeftOut, report: Report,
) -> Iterator[tuple[str, Piece]]:  # fmt: skip
    """The split and ids of every document of the task, with its end token; counted in `record`."""
    apart = settings.layout.loss_span == RESPONSE
    since = Count()
    documents = _kept(task, settings, corpus, left_out)
    for document in encode_documents(documents, tokenizer):
        split = settings.split_of(document.id)
        own = document.text_bytes, len(document.ids)
        record.counts[split].add_document(*own)
        if document.source:
            record.sources.setdefault(document.source, Count()).add_document(*own)
        since.add_document(*own)
        if since.documents == REPORT_EVERY_DOCUMENTS:
            report(since.documents, since.text_bytes, since.tokens)
            since = Count()
        yield split, Piece(document.ids, prompt=document.prompt_tokens if apart else 0)
    report(since.documents, since.text_bytes, since.tokens)


def _kept(
    task: Task, settings: PrepareSettings, corpus: Corpus, left_out: LeftOut
) -> Iterator[Document]:
    """The task's documents but those that a rule removed; of later epochs only those of the train
    split. The others are counted."""
    removals = Removals(settings, task)
    # The first epoch before later ones.
    for number in sorted(range(len(task.parts)), key=lambda n: task.parts[n].epoch > 0):
        part = task.parts[number]
        removed = removals.of(number)
        for place, document in enumerate(corpus.documents([part])):
            if place in removed:
                left_out.filtered[removed[place]] += 1
            elif part.epoch and settings.split_of(document.id) != "train":
                left_out.refused[HELD_OUT_ALREADY] += 1
            else:
                yield document
        left_out.refused.update(corpus.refused)


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
    except (OSError, ValueError, KeyError, TypeError):
        return None
    written = values["train"]
    shards = [ShardInfo(**shard) for shard in written["shards"]]
    for shard in shards:
        path = folder / shard.name
        there = path.is_file() and path.stat().st_size == shard.bytes
        if not there and not moved(shard):
            return None
    return Record(
        key=values["key"],
        train=Written(**{**written, "shards": shards}),
        counts={name: Count(**own) for name, own in values["counts"].items()},
        sources={name: Count(**own) for name, own in values["sources"].items()},
        refused=values["refused"],
        filtered=values["filtered"],
    )


def _save_rests(
    path: Path, rests: dict[str, list[Piece]], token_counts: NDArray[np.int64], tokenizer: Tokenizer
) -> None:
    """Arrays one behind another, as `load_rests` reads them: an archive of them takes longer to
    make than the shard of a small task."""
    arrays: list[NDArray[Any]] = [token_counts]
    for split in SPLITS:
        pieces = rests[split]
        empty = np.zeros(0, dtype=tokenizer.dtype)
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
