"""A corpus divided into tasks, each of which can be prepared without the others.

The division depends on the corpus and the config alone, so it does not matter how many processes,
jobs or machines share the tasks, in what order they end, or how often they are interrupted.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from data_prep.corpora import Corpus, Part
from data_prep.filters.identity import screening_identity
from data_prep.formats.manifest import FORMAT_VERSION
from data_prep.settings import PrepareSettings
from data_prep.tokenizers.load import Tokenizer
from tidar_common.config import config_hash
from tidar_common.errors import UserError

TASKS = 64
SMALLEST_TASK_BYTES, LARGEST_TASK_BYTES = 2_000_000, 128_000_000
PARTS_OF_A_TASK = 16


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


def plan_key(settings: PrepareSettings, tasks: Sequence[Task]) -> str:
    """Identity of a whole preparation."""
    return config_hash([settings.config_hash, [task.key for task in tasks]])


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
    key = [FORMAT_VERSION, settings.config_hash, tokenizer.sha256]
    key += screening_identity(settings, parts)
    tasks: list[Task] = []
    own: list[Part] = []
    for number, part in enumerate(parts, 1):
        own.append(part)
        if number == len(parts) or sum(one.bytes for one in own) + parts[number].bytes > size:
            described = [{**vars(one), "paths": None} for one in own]
            task_key = config_hash([*key, len(tasks), described])
            tasks.append(Task(len(tasks), tuple(own), task_key))
            own = []
    return _with_first_readings(tasks)


def _with_first_readings(tasks: Sequence[Task]) -> list[Task]:
    def text(part: Part) -> tuple[Any, ...]:
        return part.source, part.names, part.start, part.end

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


def own_tasks(settings: PrepareSettings, tasks: Sequence[Task]) -> list[Task]:
    """Those that this process has to do; UserError when there are fewer tasks than jobs."""
    index, count = settings.array_share()
    if count > max(len(tasks), 1):
        raise UserError(
            f"array: {count} jobs, but the corpus makes only {len(tasks)} tasks; use fewer jobs or "
            "a smaller task_bytes"
        )
    return [task for task in tasks if task.number % count == index]


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
