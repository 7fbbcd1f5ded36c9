"""The file of answers: JSON lines, appended to one by one, gone on with after any interruption."""

import contextlib
import fcntl
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from data_prep.tokenizers.load import Tokenizer
from pipeline.decoding.generate import Generation
from pipeline.decoding.prompts import PromptRow
from pipeline.decoding.text import INCOMPLETE, TextStream
from tidar_common.errors import UserError

SKIPPED = "skipped"
"""`stopped_by` of a prompt that was too long."""


@dataclass
class Answers:
    """An open file of answers."""

    settings: str
    """Fingerprint that every line has."""
    file: IO[str]
    done: set[str] = field(default_factory=set)
    """Ids of the prompts that have a line."""
    stopped_by: Counter[str] = field(default_factory=Counter)
    """Lines by what ended their text."""
    same_tokens: Counter[bool] = field(default_factory=Counter)
    """Whether a text encodes to the tokens that were drawn, of those that were not cut short."""

    def add(self, line: dict[str, Any]) -> None:
        """Write one line, at once."""
        self.file.write(json.dumps(line | {"settings": self.settings}, ensure_ascii=False) + "\n")
        self.file.flush()
        self._count(line)

    def read(self, path: Path, text_of: Callable[[str], str | None]) -> int:
        """Take in the whole lines of `path`; returns the byte behind the last of them."""
        end = 0
        with path.open("rb") as content:
            for number, raw in enumerate(content, 1):
                if not raw.endswith(b"\n"):
                    break
                end += len(raw)
                try:
                    line = json.loads(raw)
                    own, identity, prompt = line["settings"], str(line["id"]), line["prompt"]
                except (ValueError, TypeError, KeyError) as error:
                    raise UserError(
                        f"output: {path}:{number} is not a line of tidar-generate; give another "
                        "file"
                    ) from error
                if own != self.settings:
                    raise UserError(
                        f"output: {path} holds texts of another model, other prompts or other "
                        "settings; give another file, or delete it"
                    )
                if text_of(identity) not in (None, prompt):
                    raise UserError(
                        f"output: {path}:{number} answers another prompt than the one that has id "
                        f"{identity} now; give another file, or delete it"
                    )
                self._count(line)
        return end

    def _count(self, line: dict[str, Any]) -> None:
        self.done.add(str(line["id"]))
        self.stopped_by[line["stopped_by"]] += 1
        if line.get("same_tokens") is not None:
            self.same_tokens[line["same_tokens"]] += 1

    def __str__(self) -> str:
        by = self.stopped_by
        parts = [f"{by.total() - by[SKIPPED]:,} answers"]
        parts += [f"{by['length']:,} of them cut at max_new_tokens"] if by["length"] else []
        parts += [f"{by[SKIPPED]:,} prompts skipped as too long"] if by[SKIPPED] else []
        if same := self.same_tokens:
            parts.append(f"{same[True] / same.total():.1%} encode to the tokens that were drawn")
        return ", ".join(parts)


@contextlib.contextmanager
def open_answers(
    path: Path, settings: str, text_of: Callable[[str], str | None]
) -> Iterator[Answers]:
    """Open `path`, which need not exist, to go on behind its last whole line.

    Args:
        path: what an interruption left of its last line is cut off.
        settings: fingerprint of what answers depend on.
        text_of: the prompt with an id, where it is known.

    Raises:
        UserError: when it holds lines of other settings or prompts, is no such file, or another
            process writes it.
    """
    try:
        file = path.open("a", encoding="utf-8")
    except OSError as error:
        raise UserError(f"output: {path} cannot be written ({error.strerror})") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"output: {path} is being written by another process; wait for it"
            ) from error
        except OSError:
            pass  # a file system without locks
        answers = Answers(settings, file)
        file.truncate(answers.read(path, text_of))
        yield answers


def answer_line(
    row: PromptRow, prompt: list[int], run: Generation, tokenizer: Tokenizer
) -> dict[str, Any]:
    """One answer, as `tidar-prepare corpus=jsonl` takes it.

    Args:
        row: the prompt.
        prompt: its ids.
        run: what came of it.
        tokenizer: the model's.
    """
    cut, ended = run.stopped_by == "length", run.stopped_by == "eos"
    text = run.text
    if text is None:
        decoder = TextStream(tokenizer, prompt)
        text = decoder.add(run.tokens) + decoder.end()
    if cut:  # in the middle of a character, perhaps
        text = text.rstrip(INCOMPLETE)
    drawn = run.tokens[:-1] if ended else run.tokens
    return _line(row, run, text, tokenizer.encode(text) == drawn if ended or cut else None)


def skipped_line(row: PromptRow) -> dict[str, Any]:
    """In place of an answer to a prompt that leaves it no room; `tidar-prepare` refuses it as
    empty."""
    return _line(row, Generation(stopped_by=SKIPPED), "", None)


def _line(row: PromptRow, run: Generation, text: str, same_tokens: bool | None) -> dict[str, Any]:
    return {
        "id": row.id,
        "category": row.category,
        "prompt": row.prompt,
        "text": text,
        "cut": run.stopped_by == "length",
        "tokens": len(run.tokens),
        "forwards": run.forwards,
        "tokens_per_forward": run.tokens_per_forward,
        "seconds": run.seconds,
        "stopped_by": run.stopped_by,
        "same_tokens": same_tokens,
    }
