"""Prompts from the command line, from a text file, many from a JSON-lines file or out of prepared
data; and which of many a process continues, where several share them."""

import json
import os
import re
import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.formats.groups import PackedGroup, PackedSequence
from data_prep.formats.manifest import SPLITS, Manifest
from data_prep.formats.shards import ShardReader
from data_prep.tokenizers.load import Tokenizer, load_tokenizer
from pipeline.decoding.text import INCOMPLETE
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


ORDER_SEED = 0
"""Of the order in which groups are read: the same for every seed of the sampling, so that a second
answer is to the same prompts."""


class DocumentPrompts:
    """The beginnings of the documents of one split, in an order that depends on the data alone.

    Groups of packed sequences come in a random order, so that the first prompts are a sample of
    the whole split. What is kept in memory of a prompt is where it stands, 32 bytes.

    Only documents that are longer than their prompt count, and of a document that was cut only
    its first piece.
    """

    def __init__(
        self,
        data_dir: Path,
        tokenizer: Tokenizer,
        *,
        split: str,
        prompt_tokens: int | None,
        limit: int | None,
        share: Share,
    ) -> None:
        """Find this share's prompts; reads the shards once, up to `limit` prompts.

        Args:
            data_dir: a folder written by `tidar-prepare`.
            tokenizer: the model's.
            split: `train` or `heldout`.
            prompt_tokens: tokens of each prompt; None takes the prompts that the data was prepared
                with.
            limit: most prompts of all shares together.
            share: which of them are this process's.

        Raises:
            UserError: when no document is long enough, or the data has another tokenizer.
        """
        if split not in SPLITS:
            raise UserError(f"prompts_split: {split!r} is not {' or '.join(SPLITS)}")
        manifest = Manifest.load(data_dir)
        if load_tokenizer(data_dir).content() != tokenizer.content():
            raise UserError(
                f"prompts_data: {data_dir} was prepared with another tokenizer than the model's; "
                "give data prepared with the model's, or the prompts as text in a prompts_file"
            )
        self._dir, self._tokenizer, self._manifest = data_dir, tokenizer, manifest
        self._prompt_tokens = prompt_tokens
        chosen = manifest.splits[split]
        first = 0 if split == SPLITS[0] else len(manifest.train.shards)
        index = manifest.shard_index(data_dir)[first : first + len(chosen.shards)]
        self._shards = list(zip(chosen.shards, index, strict=True))
        self._first_group = np.cumsum([0] + [manifest.groups(shard) for shard in chosen.shards])
        self._group = lru_cache(maxsize=1)(self._read_group)
        self.settings: dict[str, Any] = {
            "data": manifest.fingerprint(), "split": split, "prompt_tokens": prompt_tokens,
        }  # fmt: skip
        self.total, self._places = self._find(limit, share)
        if not self.total:
            raise UserError(f"prompts_data: no document of {data_dir}'s {split} split {self._lack}")

    @property
    def _lack(self) -> str:
        if self._prompt_tokens is None:
            return "has a prompt; give prompt_tokens"
        return f"has more than {self._prompt_tokens} tokens; give a smaller prompt_tokens"

    def __len__(self) -> int:
        return len(self._places)

    def id_of(self, place: int) -> str:
        """Names the shard, the sequence in it, and the token in that at which the prompt begins."""
        group, sequence, start, _ = self._places[place].tolist()
        shard, number = self._shard_of(group)
        name = self._shards[shard][0].name
        return f"{name}:{number * self._manifest.group_size + sequence}:{start}"

    def __getitem__(self, place: int) -> PromptRow:
        group, sequence, start, length = self._places[place].tolist()
        ids = self._group(group)[sequence].tokens[start : start + length]
        # A character that the cut divides is left out.
        text = self._tokenizer.decode(ids.tolist()).rstrip(INCOMPLETE)
        return PromptRow(self.id_of(place), text)

    def text_of(self, identity: str) -> str | None:
        """Not known without reading; `settings` tell other data apart."""

    def _find(self, limit: int | None, share: Share) -> tuple[int, NDArray[np.int64]]:
        """How many prompts there are for all, and of this share's own: group, sequence in it,
        first token and length, int64 [prompts, 4]."""
        kept = array("q")
        total = 0
        for place in self._everywhere():
            if total == limit:
                break
            if total % share.count == share.index:
                kept.extend(place)
            total += 1
        return total, np.array(kept, dtype=np.int64).reshape(-1, 4)

    def _everywhere(self) -> Iterator[tuple[int, int, int, int]]:
        groups = np.random.default_rng(ORDER_SEED).permutation(int(self._first_group[-1]))
        for group in groups.tolist():
            for number, sequence in enumerate(self._group(group)):
                for start, length in self._beginnings(sequence):
                    yield group, number, start, length

    def _beginnings(self, sequence: PackedSequence) -> list[tuple[int, int]]:
        """First token and length of the prompts in a sequence."""
        lengths = np.asarray(sequence.document_lengths, dtype=np.int64)
        starts = np.cumsum(lengths) - lengths
        if self._prompt_tokens is not None:
            sizes = np.full_like(lengths, self._prompt_tokens)
        elif sequence.prompt_lengths is None:
            return []
        else:
            sizes = np.asarray(sequence.prompt_lengths, dtype=np.int64)
        real = sequence.real_tokens(self._manifest.tokenizer.pad_id)
        fits = (starts < real) & (sizes > 0) & (sizes < lengths)
        if sequence.continued is not None:
            fits &= ~sequence.continued
        starts, sizes = starts[fits], sizes[fits]
        # An end token alone is nothing to continue with.
        more = sequence.tokens[starts + sizes] != self._manifest.tokenizer.eos_id
        return list(zip(starts[more].tolist(), sizes[more].tolist(), strict=True))

    def _shard_of(self, group: int) -> tuple[int, int]:
        """The shard that holds `group` of the split, and which of its groups that is."""
        shard = int(np.searchsorted(self._first_group, group, side="right")) - 1
        return shard, group - int(self._first_group[shard])

    def _read_group(self, group: int) -> PackedGroup:
        shard, number = self._shard_of(group)
        info, offsets = self._shards[shard]
        reader = ShardReader(self._dir / info.name, offsets)
        try:
            return reader.read_group(number)
        finally:
            reader.close()
