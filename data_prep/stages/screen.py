"""Screen: which documents are removed, decided task by task before anything is packed.

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

from data_prep.config import PrepareSettings
from data_prep.corpora import utf8_bytes
from data_prep.filters.config import datatrove_version
from data_prep.filters.duplicates import EXACT, MINHASH, Signer, duplicates
from data_prep.formats.manifest import CONTAMINATED
from data_prep.stages.output_folder import TASKS_FOLDER, taking_turns
from data_prep.stages.plan import Preparation, Task
from data_prep.stages.workers import BatchedReport, Report, Workers
from tidar_common.config import config_hash
from tidar_common.files import sha256_of, write_text_atomic, written_atomically
from tidar_common.progress import Progress

FOLDER = "screening"
COPIES = "copies.json"
"""Written when the copies of all tasks are known."""
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

    _latest: ClassVar["Screen | None"] = None

    def __init__(self, settings: PrepareSettings) -> None:
        self.settings = settings

    @classmethod
    def of(cls, settings: PrepareSettings) -> "Screen":
        # Not by equal settings: in another preparation the same files may hold other evals.
        if cls._latest is None or cls._latest.settings is not settings:
            cls._latest = cls(settings)
        return cls._latest

    @cached_property
    def rule_of(self) -> Callable[[str], str | None]:
        from data_prep.filters.rules import Rules

        return Rules(self.settings.filters).broken_by

    @cached_property
    def evals(self) -> Any:
        from data_prep.filters.decontamination import EvalIndex

        return EvalIndex(self.settings.decontaminate)

    @cached_property
    def signer(self) -> Signer:
        return Signer(self.settings.dedup)


def screen(
    preparation: Preparation, tasks: Sequence[Task], tasks_here: Sequence[Task], workers: Workers
) -> bool:
    """Judge the documents of `tasks_here`, and where all `tasks` are judged then, find the copies.

    Returns:
        bool: whether it is known now of all tasks which documents to leave out.
    """
    settings = preparation.settings
    if not settings.screens:
        return True
    unscreened = [task for task in tasks_here if not is_screened(settings, task)]
    if unscreened:
        print(f"screening {len(unscreened)} of {len(tasks_here)} tasks ...", flush=True)
    workers.run(screen_task, unscreened, preparation, Progress().add)
    done = sum(is_screened(settings, task) for task in tasks)
    if done < len(tasks):
        print(
            f"{done} of {len(tasks)} tasks are screened; when all are, start the same jobs once "
            "more to pack them"
        )
        return False
    with taking_turns(settings.output_dir):
        find_copies(settings, tasks)
    return True


def screen_task(task: Task, preparation: Preparation, report: Report) -> None:
    """Judge the documents of one task and leave a record; raises UserError for a bad corpus."""
    settings = preparation.settings
    rules, progress = Screen.of(settings), BatchedReport(report)
    screened = Screened(task.key)
    places: list[tuple[int, int]] = []
    keys, signed = [], []
    for number, part in enumerate(task.parts):
        if part.epoch:
            continue
        for place, document in enumerate(preparation.corpus.documents([part])):
            text = document.whole
            progress.add(1, utf8_bytes(text), 0)
            rule = rules.rule_of(text)
            match = None if rule else rules.evals.found_in(text)
            if match:
                rule = f"contaminated: {match[0]}"
                screened.contaminated.append(
                    {"id": document.id, "rule": rule, "eval": match[0], "ngram": match[1]}
                )
            if rule:
                screened.removed.append([number, place, rule])
            elif settings.dedup.any:
                document_keys, has_minhash = rules.signer.keys(text)
                places.append((number, place))
                keys.append(document_keys)
                signed.append(has_minhash)
    progress.flush()
    folder = _folder(settings)
    if settings.dedup.any:
        columns = np.array(keys, dtype=np.uint64).reshape(len(keys), rules.signer.columns).T
        with written_atomically(folder / f"{task.number:06d}-keys.npz") as file:
            np.savez(
                file,
                keys=np.ascontiguousarray(columns),
                signed=np.array(signed, dtype=bool),
                places=np.array(places, dtype=np.int64).reshape(-1, 2),
            )
    write_text_atomic(folder / f"{task.number:06d}.json", json.dumps(vars(screened)))


def is_screened(settings: PrepareSettings, task: Task) -> bool:
    """Whether a task was screened with just this input and config."""
    try:
        if _load(settings, task).key != task.key:
            return False
    except (OSError, ValueError, TypeError):
        return False
    keys = _folder(settings) / f"{task.number:06d}-keys.npz"
    return not settings.dedup.any or keys.is_file()


def find_copies(settings: PrepareSettings, tasks: Sequence[Task]) -> None:
    """Find the copies among the documents of all tasks, which must be screened."""
    folder, key = _folder(settings), config_hash([task.key for task in tasks])
    try:
        if not settings.dedup.any or json.loads((folder / COPIES).read_text()) == key:
            return
    except (OSError, ValueError):
        pass  # not found yet
    arrays = [_arrays(folder / f"{task.number:06d}-keys.npz") for task in tasks]
    counts = [len(of_task["signed"]) for of_task in arrays]
    signed = np.concatenate([of_task["signed"] for of_task in arrays])
    copies, exact = duplicates(settings.dedup, [of_task["keys"] for of_task in arrays], signed)
    ends = np.cumsum(counts)
    bounds = np.searchsorted(copies, [0, *ends])
    for number, (task, of_task) in enumerate(zip(tasks, arrays, strict=True)):
        mine = slice(bounds[number], bounds[number + 1])
        places = of_task["places"][copies[mine] - (ends[number] - counts[number])]
        with written_atomically(folder / f"{task.number:06d}-copies.npz") as file:
            np.savez(file, places=places, exact=exact[mine])
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
        readings = self._task.first_readings
        task, part = readings[number] if readings else (self._task.number, number)
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


def describe_screening(settings: PrepareSettings, tasks: Sequence[Task]) -> dict[str, Any]:
    """What removed documents, beside the config: the manifest's `filters`. Lists those with an
    eval's text in the output folder."""
    if not settings.screens:
        return {}
    described: dict[str, Any] = {"datatrove": datatrove_version()}
    if settings.decontaminate.any:
        path = settings.output_dir / CONTAMINATED
        entries = [entry for task in tasks for entry in _load(settings, task).contaminated]
        write_text_atomic(path, "".join(f"{json.dumps(entry)}\n" for entry in entries))
        described["evals"] = Screen.of(settings).evals.described()
        described["contaminated_sha256"] = sha256_of(path)
    return described


def _folder(settings: PrepareSettings) -> Path:
    return settings.output_dir / TASKS_FOLDER / FOLDER


def _load(settings: PrepareSettings, task: Task) -> Screened:
    return Screened(**json.loads((_folder(settings) / f"{task.number:06d}.json").read_text()))


def _arrays(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}
