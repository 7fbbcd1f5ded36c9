"""Which documents are removed, decided task by task before anything is packed.

A task's documents are judged by the rules, looked up in the evals, and given keys; when that is
done for all tasks, copies are found among the keys. Of a corpus that is read more than once the
first reading is judged, and counts for the later ones. What is decided depends on the text and
the config, like the tasks themselves, and stands in the tasks' folder until all is packed.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from data_prep.corpora import Corpus, utf8_bytes
from data_prep.filters.duplicates import EXACT, MINHASH, duplicates
from data_prep.settings import PrepareSettings
from data_prep.stages.plan import Task
from data_prep.tokenizers.load import Tokenizer
from tidar_common.config import config_hash
from tidar_common.files import write_text_atomic, written_atomically

FOLDER = "screening"
COPIES = "copies.json"
"""Written when the copies of all tasks are known."""
REPORT_EVERY_DOCUMENTS = 500
Removed = dict[int, str]
"""By the document's place in its part: the rule it was removed by."""


@dataclass
class Screened:
    """What is known of a task's documents before copies are looked for."""

    key: str
    removed: list[list[Any]] = field(default_factory=list)
    """Part, place in the part, and rule."""
    contaminated: list[dict[str, str]] = field(default_factory=list)
    """Of those with an eval's text: id, rule, eval and n-gram."""


class Screen:
    """The rules, evals and keys of a preparation, made once in every process."""

    _made: ClassVar["Screen | None"] = None

    def __init__(self, settings: PrepareSettings) -> None:
        self.settings = settings

    @classmethod
    def of(cls, settings: PrepareSettings) -> "Screen":
        # Not by equal settings: in another preparation the same files may hold other evals.
        if cls._made is None or cls._made.settings is not settings:
            cls._made = cls(settings)
        return cls._made

    @cached_property
    def rule_of(self) -> Callable[[str], str | None]:
        from data_prep.filters.rules import Rules

        return Rules(self.settings.filters).broken_by

    @cached_property
    def evals(self) -> Any:
        from data_prep.filters.decontamination import EvalIndex

        return EvalIndex(self.settings.decontaminate)

    @cached_property
    def signer(self) -> Any:
        from data_prep.filters.signatures import Signer

        return Signer(self.settings.dedup)


def screen_task(
    task: Task, settings: PrepareSettings, corpus: Corpus, tokenizer: Tokenizer,
    report: Callable[[int, int, int], None],
) -> None:  # fmt: skip
    """Judge the documents of one task and leave a record; raises UserError for a bad corpus."""
    screen = Screen.of(settings)
    found = Screened(task.key)
    places: list[tuple[int, int]] = []
    keys, signed = [], []
    since = size = 0
    for number, part in enumerate(task.parts):
        if part.epoch:
            continue
        for place, document in enumerate(corpus.documents([part])):
            text = document.whole
            since, size = since + 1, size + utf8_bytes(text)
            if since == REPORT_EVERY_DOCUMENTS:
                report(since, size, 0)
                since = size = 0
            rule = screen.rule_of(text)
            match = None if rule else screen.evals.found_in(text)
            if match:
                rule = f"contaminated: {match[0]}"
                found.contaminated.append(
                    {"id": document.id, "rule": rule, "eval": match[0], "ngram": match[1]}
                )
            if rule:
                found.removed.append([number, place, rule])
            elif settings.dedup.any:
                own, has_minhash = screen.signer.keys(text)
                places.append((number, place))
                keys.append(own)
                signed.append(has_minhash)
    report(since, size, 0)
    folder = _folder(settings)
    if settings.dedup.any:
        columns = np.array(keys, dtype=np.uint64).reshape(len(keys), screen.signer.columns).T
        with written_atomically(folder / f"{task.number:06d}-keys.npz") as file:
            np.savez(
                file,
                keys=np.ascontiguousarray(columns),
                signed=np.array(signed, dtype=bool),
                places=np.array(places, dtype=np.int64).reshape(-1, 2),
            )
    write_text_atomic(folder / f"{task.number:06d}.json", json.dumps(vars(found)))


def is_screened(settings: PrepareSettings, task: Task) -> bool:
    """Whether a task was screened with just this input and config."""
    try:
        found = _load(settings, task).key == task.key
    except (OSError, ValueError, TypeError):
        return False
    keys = _folder(settings) / f"{task.number:06d}-keys.npz"
    return found and (not settings.dedup.any or keys.is_file())


def find_copies(settings: PrepareSettings, tasks: Sequence[Task]) -> None:
    """Find the copies among the documents of all tasks, which must be screened."""
    folder, key = _folder(settings), config_hash([task.key for task in tasks])
    try:
        if not settings.dedup.any or json.loads((folder / COPIES).read_text()) == key:
            return
    except (OSError, ValueError):
        pass  # not found yet
    arrays = [_arrays(folder / f"{task.number:06d}-keys.npz") for task in tasks]
    counts = [len(own["signed"]) for own in arrays]
    signed = np.concatenate([own["signed"] for own in arrays])
    copies, exact = duplicates(settings.dedup, [own["keys"] for own in arrays], signed)
    ends = np.cumsum(counts)
    bounds = np.searchsorted(copies, [0, *ends])
    for task, own, end, first, last in zip(
        tasks, arrays, ends, bounds, bounds[1:], strict=False
    ):  # fmt: skip
        inside = copies[first:last] - (end - len(own["signed"]))
        with written_atomically(folder / f"{task.number:06d}-copies.npz") as file:
            np.savez(file, places=own["places"][inside], exact=exact[first:last])
    write_text_atomic(folder / COPIES, json.dumps(key))


class Removals:
    """The documents of a task that are left out, by part."""

    def __init__(self, settings: PrepareSettings, task: Task) -> None:
        self._settings = settings
        self._task = task
        self._of_task: dict[int, dict[int, Removed]] = {}

    def of(self, number: int) -> Removed:
        """Those of the task's part `number`, as they were judged at its first reading."""
        if not self._settings.screens:
            return {}
        own = (self._task.number, number)
        task, part = self._task.first_readings[number] if self._task.first_readings else own
        if task not in self._of_task:
            self._of_task[task] = self._load(task)
        return self._of_task[task].get(part, {})

    def _load(self, task: int) -> dict[int, Removed]:
        folder = _folder(self._settings)
        record = json.loads((folder / f"{task:06d}.json").read_text())
        removed: dict[int, Removed] = {}
        for part, place, rule in record["removed"]:
            removed.setdefault(part, {})[place] = rule
        if self._settings.dedup.any:
            arrays = _arrays(folder / f"{task:06d}-copies.npz")
            for (part, place), exact in zip(
                arrays["places"].tolist(), arrays["exact"].tolist(), strict=True
            ):
                removed.setdefault(part, {})[place] = EXACT if exact else MINHASH
        return removed


def contaminated_lines(settings: PrepareSettings, tasks: Sequence[Task]) -> list[str]:
    """A JSON object for every document with an eval's text, in the order of the tasks."""
    return [
        json.dumps(entry) for task in tasks for entry in _load(settings, task).contaminated
    ]  # fmt: skip


def _folder(settings: PrepareSettings) -> Path:
    return settings.output_dir / "tasks" / FOLDER


def _load(settings: PrepareSettings, task: Task) -> Screened:
    return Screened(**json.loads((_folder(settings) / f"{task.number:06d}.json").read_text()))


def _arrays(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}
