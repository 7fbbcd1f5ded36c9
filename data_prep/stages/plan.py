"""Plan: the tokenizer, and a corpus divided into tasks that can be prepared without each other.

The division depends on the corpus and the config alone, so it does not matter how many processes,
jobs or machines share the tasks, in what order they end, or how often they are interrupted.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_prep.config import PrepareSettings
from data_prep.corpora import Corpus, Part
from data_prep.filters.config import datatrove_version
from data_prep.filters.decontamination import eval_files, files_sha256
from data_prep.formats.manifest import FORMAT_VERSION
from data_prep.layout import RESPONSE
from data_prep.stages.output_folder import TASKS_FOLDER
from data_prep.tokenizers.load import (
    HUGGINGFACE_FILE,
    SENTENCEPIECE_FILE,
    Tokenizer,
    load_tokenizer,
)
from data_prep.tokenizers.train import train_sentencepiece
from tidar_common.config import config_hash
from tidar_common.errors import UserError
from tidar_common.files import sha256_of, write_text_atomic
from tidar_common.hub import TOKENIZER_PATTERNS, fetched

TASKS = 64
SMALLEST_TASK_BYTES, LARGEST_TASK_BYTES = 2_000_000, 128_000_000
PARTS_OF_A_TASK = 16
TOKENIZER_FILES = {"sentencepiece": SENTENCEPIECE_FILE, "huggingface": HUGGINGFACE_FILE}
TRAINED = "tokenizer.json"
"""In the tasks' folder: from what text the tokenizer of the output folder was trained."""
COMPARED_BYTES, COMPARED_SHARE = 1_000_000, 200
"""Text on which a fast encoder has to give what the plain one gives; of a corpus that is small half
a hundredth, or comparing would take longer than what it saves."""


@dataclass(frozen=True)
class Task:
    """Parts of the corpus that are packed and shuffled together."""

    number: int
    parts: tuple[Part, ...]
    key: str
    """SHA-256 of everything that decides what comes out: config, tokenizer, and which bytes of
    which files, with their sizes and times."""
    first_readings: tuple[tuple[int, int], ...] = ()
    """Of each part: the task and the part in it that read the same text in the first epoch."""


@dataclass(frozen=True)
class Preparation:
    """What every task is done with; it travels to the worker processes."""

    settings: PrepareSettings
    corpus: Corpus
    tokenizer: Tokenizer
    encoder: str = "plain"
    """The way in which the tokenizer encodes, of `tokenizer.encoders`."""


def make_plan(settings: PrepareSettings, corpus: Corpus) -> tuple[Preparation, list[Task]]:
    """Train or load the tokenizer, divide the corpus, and choose the fastest encoder.

    Raises:
        UserError: for a tokenizer that cannot be had, a file of the corpus that cannot be read, or
            prompts that the corpus does not tell apart.
    """
    if settings.layout.loss_span == RESPONSE and not corpus.has_prompts:
        raise UserError(
            "layout.loss_span: response needs a corpus that tells prompts apart; set "
            "corpus.prompt_field (jsonl, parquet, arrow), or layout.loss_span=document"
        )
    tokenizer = make_tokenizer(settings, corpus)
    tasks = make_tasks(settings, corpus, tokenizer)
    encoder = fastest_encoder(tokenizer, corpus, tasks)
    return Preparation(settings, corpus, tokenizer, encoder), tasks


def make_tokenizer(settings: PrepareSettings, corpus: Corpus) -> Tokenizer:
    """The tokenizer that the settings name, trained on the training split where they ask for it.

    One that an interrupted preparation trained on the same text is taken as it is.
    """
    config = settings.tokenizer
    if config.path is None:
        return _trained_before(settings, corpus) or _train(settings, corpus)
    path = fetched(config.path, "tokenizer.path", TOKENIZER_PATTERNS)
    if path.is_dir():
        path = path / TOKENIZER_FILES[config.kind]
    tokenizer = load_tokenizer(path, config.eos_token)
    if tokenizer.kind != config.kind:
        raise UserError(f"tokenizer.path: {path} is not for tokenizer={config.kind}")
    return tokenizer


def _train(settings: PrepareSettings, corpus: Corpus) -> Tokenizer:
    config = settings.tokenizer
    print(f"training a SentencePiece model with {config.vocab_size} pieces ...", flush=True)
    texts = (
        document.whole for document in corpus.documents() if settings.split_of(document) == "train"
    )
    return train_sentencepiece(
        texts, config.vocab_size, config.model_type, config.sample_bytes, settings.seed
    )


def _trained_before(settings: PrepareSettings, corpus: Corpus) -> Tokenizer | None:
    path = settings.output_dir / SENTENCEPIECE_FILE
    try:
        note = json.loads((settings.output_dir / TASKS_FOLDER / TRAINED).read_text())
        return load_tokenizer(path) if note == _training_note(settings, corpus, path) else None
    except (OSError, ValueError):
        return None  # nothing of an earlier start that can be used


def save_tokenizer(preparation: Preparation) -> None:
    """Write it into the output folder, and what it was trained on beside the tasks, so that a rerun
    need not train it again."""
    settings = preparation.settings
    path = preparation.tokenizer.save(settings.output_dir)
    if settings.tokenizer.path is None:
        note = _training_note(settings, preparation.corpus, path)
        write_text_atomic(settings.output_dir / TASKS_FOLDER / TRAINED, json.dumps(note))


def _training_note(settings: PrepareSettings, corpus: Corpus, path: Path) -> dict[str, str]:
    """Identity of the text and the config that a tokenizer is trained with, and of its file."""
    stamps = [part.stamp for part in corpus.parts() if part.epoch == 0]
    return {"from": config_hash([settings.config_hash, stamps]), "sha256": sha256_of(path)}


def make_tasks(settings: PrepareSettings, corpus: Corpus, tokenizer: Tokenizer) -> list[Task]:
    """Divide the corpus.

    Parts are taken in an order drawn by the seed, so that those of one task, which is shuffled
    as a whole, come from places far apart, and every task has some of everything.

    Raises:
        UserError: when a file of the corpus cannot be read.
    """
    corpus.weigh(lambda texts: sum(map(len, tokenizer.encode_batch(texts))))
    size = task_bytes(settings, corpus)
    parts = corpus.parts(max(size // PARTS_OF_A_TASK, 1))
    random.Random(f"{settings.seed} parts").shuffle(parts)
    key = [FORMAT_VERSION, settings.config_hash, tokenizer.sha256, settings.heldout_fraction]
    key += _screening_key(settings, parts)
    tasks: list[Task] = []
    gathered: list[Part] = []
    for number, part in enumerate(parts, 1):
        gathered.append(part)
        if number == len(parts) or sum(p.bytes for p in gathered) + parts[number].bytes > size:
            described = [{**vars(p), "paths": None} for p in gathered]
            task_key = config_hash([*key, len(tasks), described])
            tasks.append(Task(len(tasks), tuple(gathered), task_key))
            gathered = []
    return _with_first_readings(tasks)


def _screening_key(settings: PrepareSettings, parts: Sequence[Part]) -> list[Any]:
    """What decides which documents are removed, beside the config: datatrove's version, the evals'
    contents, and, where copies are looked for, the whole corpus; empty where nothing is removed."""
    if not settings.screens:
        return []
    evals = settings.decontaminate.evals or {}
    contents = [[name, files_sha256(eval_files(name, path))] for name, path in evals.items()]
    whole = [[p.names, p.start, p.end, p.stamp] for p in parts] if settings.dedup.any else []
    return [datatrove_version(), sorted(contents), whole]


def _with_first_readings(tasks: Sequence[Task]) -> list[Task]:
    def text(part: Part) -> tuple[Any, ...]:
        return part.source, part.split, part.names, part.start, part.end

    first = {
        text(part): (task.number, number)
        for task in tasks
        for number, part in enumerate(task.parts)
        if part.epoch == 0
    }
    return [replace(t, first_readings=tuple(first[text(p)] for p in t.parts)) for t in tasks]


def task_bytes(settings: PrepareSettings, corpus: Corpus) -> int:
    """Text of one task."""
    if settings.task_bytes is not None:
        return settings.task_bytes
    return min(max(corpus.total_bytes // TASKS, SMALLEST_TASK_BYTES), LARGEST_TASK_BYTES)


def fastest_encoder(tokenizer: Tokenizer, corpus: Corpus, tasks: Sequence[Task]) -> str:
    """The fastest way of `tokenizer.encoders` that gives the ids of the plain one on up to a
    megabyte of this corpus, from all over it; prints a line about one that does not."""
    if len(tokenizer.encoders) == 1:
        return tokenizer.encoders[0]
    texts, size = [], 0
    enough = min(COMPARED_BYTES, max(corpus.total_bytes // COMPARED_SHARE, COMPARED_BYTES // 10))
    # Parts are in an order drawn by the seed: the first few stand for all.
    for document in corpus.documents(part for task in tasks for part in task.parts):
        texts.append(document.whole)
        size += len(document.whole.encode())
        if size >= enough:
            break
    expected = [tokenizer.encode(text) for text in texts]
    for encoder in tokenizer.encoders[:-1]:
        encoded = tokenizer.encode_batch(texts, encoder)
        differing = sum(
            ids.tolist() != plain for ids, plain in zip(encoded, expected, strict=True)
        )  # fmt: skip
        if differing == 0:
            return encoder
        print(
            f"encoder {encoder}: other ids on {differing} of {len(texts)} documents, so it is not "
            "used",
            flush=True,
        )
    return tokenizer.encoders[-1]


def tasks_of_this_job(settings: PrepareSettings, tasks: Sequence[Task]) -> list[Task]:
    """Those that this process has to do; UserError when there are fewer tasks than jobs."""
    index, count = settings.array_share()
    if count > max(len(tasks), 1):
        raise UserError(
            f"array: {count} jobs, but the corpus makes only {len(tasks)} tasks; use fewer jobs or "
            "a smaller task_bytes"
        )
    return [task for task in tasks if task.number % count == index]


def plan_key(settings: PrepareSettings, tasks: Sequence[Task]) -> str:
    """Identity of a whole preparation."""
    return config_hash([settings.config_hash, [task.key for task in tasks]])


def epochs_read(tasks: Sequence[Task]) -> dict[str, float]:
    """Of each corpus in a mix: how often the tasks read it, by its text."""
    read: dict[str, int] = {}
    whole: dict[str, int] = {}
    for task in tasks:
        for part in task.parts:
            read[part.source] = read.get(part.source, 0) + part.bytes
            if part.epoch == 0:
                whole[part.source] = whole.get(part.source, 0) + part.bytes
    return {name: read[name] / max(whole.get(name, 0), 1) for name in read}
