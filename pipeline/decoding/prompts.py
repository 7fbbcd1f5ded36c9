"""Prompts from the command line, from a text file, or many from a JSON-lines file; and which of
many a process continues, where several share them."""

import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from tidar_common.config import array_share
from tidar_common.errors import UserError


@dataclass(frozen=True)
class PromptRow:
    """One line: `{"prompt": "...", "id": "...", "category": "..."}`; only `prompt` is needed."""

    id: str
    """As given, else the line's number from 0."""
    prompt: str
    category: str | None = None


@dataclass(frozen=True)
class Share:
    """The prompts whose number in the whole list is `index` modulo `count`."""

    index: int = 0
    count: int = 1

    @classmethod
    def of_process(cls, array: str | None) -> "Share":
        """That of this rank, where torchrun started several, of the `array=i/n` given.

        Raises:
            UserError: when `array` is no share.
        """
        index, count = array_share(array)
        rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        return cls(index * ranks + rank, count * ranks)

    def number(self, place: int) -> int:
        """In the whole list, of the prompt at `place` of this share."""
        return self.index + place * self.count

    def file(self, output: Path) -> Path:
        """`output` itself, or `answers-00003-of-00008.jsonl` for the fourth of eight shares."""
        if self.count == 1:
            return output
        name = f"{output.stem}-{self.index:05d}-of-{self.count:05d}{output.suffix}"
        return output.with_name(name)

    def refuse_others(self, output: Path) -> None:
        """Raise UserError when files of another number of shares stand beside `file(output)`:
        prompts would be answered twice."""
        part = re.compile(rf"{re.escape(output.stem)}-\d+-of-(\d+){re.escape(output.suffix)}")
        counts = {path: part.fullmatch(path.name) for path in sorted(output.parent.iterdir())}
        shares = {path: int(match[1]) for path, match in counts.items() if match}
        if output.is_file():
            shares[output] = 1
        for path, count in shares.items():
            if count != self.count:
                raise UserError(
                    f"output: {path} was begun in {count} shares, and these are {self.count}; go "
                    f"on with {count} (array jobs times ranks), or give another output"
                )

    def __str__(self) -> str:
        return f"share {self.index} of {self.count}: " if self.count > 1 else ""


class Prompts(Protocol):
    """The prompts of one share, by their place in it; each is read when it is asked for."""

    total: int
    """Prompts of all shares."""
    settings: dict[str, Any]
    """What tells these prompts from others with the same ids."""

    def __len__(self) -> int: ...

    def __getitem__(self, place: int) -> PromptRow: ...

    def id_of(self, place: int) -> str:
        """The id of the prompt at `place`."""

    def text_of(self, identity: str) -> str | None:
        """The prompt with that id, where it is known without reading."""


class FilePrompts:
    """One share of the rows of a file."""

    def __init__(self, rows: Sequence[PromptRow], share: Share, limit: int | None = None) -> None:
        """`limit` is the most prompts of all shares together, the first ones."""
        rows = rows[:limit]
        self.total = len(rows)
        self.settings: dict[str, Any] = {}
        self._rows = rows[share.index :: share.count]
        self._texts = {row.id: row.prompt for row in self._rows}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> PromptRow:
        return self._rows[place]

    def id_of(self, place: int) -> str:
        return self._rows[place].id

    def text_of(self, identity: str) -> str | None:
        return self._texts.get(identity)


def read_prompts(path: Path, key: str) -> list[PromptRow]:
    """The prompts of `path` in order; empty lines are skipped. A prompt that is not UTF-8, as bytes
    or as half a surrogate pair in JSON, is left out, with a line on stderr.

    Raises:
        UserError: naming `key`, the file and the line that cannot be used, or an id given twice.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{key}: {path} cannot be read ({error.strerror})") from error
    rows: list[PromptRow] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line.decode())
            prompt = values["prompt"]
            if isinstance(prompt, str):
                prompt.encode()
        except UnicodeError as error:
            reason = f"{key}: {path}:{number}: is not UTF-8 ({error}); left out"
            print(reason, file=sys.stderr, flush=True)
            continue
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(
                f'{key}: {path}:{number}: not a JSON object with a "prompt" ({error!r})'
            ) from error
        if not isinstance(prompt, str):
            raise UserError(f'{key}: {path}:{number}: "prompt" must be there, and be a text')
        name, category = str(values.get("id", number - 1)), values.get("category")
        rows.append(PromptRow(name, prompt, None if category is None else str(category)))
    if not rows:
        raise UserError(f"{key}: {path} holds no prompt")
    if len({row.id for row in rows}) < len(rows):
        raise UserError(f'{key}: {path}: an "id" stands there twice; make them different')
    return rows


def read_prompt(prompt: str, prompt_file: str | None) -> str:
    """The text to continue, letter for letter: `prompt`, standard input for `-`, or the content of
    `prompt_file`.

    Raises:
        UserError: naming the key, where it is not UTF-8 or cannot be read.
    """
    key = "prompt: standard input" if prompt == "-" else "prompt"
    try:
        if prompt_file is not None:
            if prompt:
                raise UserError("prompt: given together with prompt_file; use one of them")
            path = Path(prompt_file).expanduser()
            key = f"prompt_file: {path}"
            return path.read_bytes().decode()
        if prompt == "-":
            return sys.stdin.buffer.read().decode()
        prompt.encode()  # what was not UTF-8 on the command line is half a surrogate pair here
    except (OSError, UnicodeError) as error:
        raise UserError(f"{key}: is not UTF-8 text ({error})") from error
    return prompt


def output_file(output: str | None) -> Path:
    """Where answers go; raises UserError when none is given, or its folder is not there."""
    if output is None:
        raise UserError("output: many prompts need one; give a .jsonl file for the answers")
    path = Path(output).expanduser()
    if not path.parent.is_dir():
        raise UserError(f"output: {path.parent} is not a folder; make it first")
    return path


def rank_device(device: str | None) -> str | None:
    """`device`, or where none is named the GPU of this rank's own among those of its machine.

    Raises:
        UserError: when the machine has fewer GPUs than ranks.
    """
    local = os.environ.get("LOCAL_RANK")
    if device is not None or local is None or not torch.cuda.is_available():
        return device
    if int(local) >= torch.cuda.device_count():
        raise UserError(
            f"device: rank {local} of this machine has no GPU of its own, there are "
            f"{torch.cuda.device_count()}; start as many ranks"
        )
    torch.cuda.set_device(int(local))
    return f"cuda:{local}"
