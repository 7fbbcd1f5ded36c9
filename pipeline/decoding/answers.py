"""Many prompts to a file of answers: JSON lines, appended one by one, resumable after any
interruption."""

import contextlib
import fcntl
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from data_prep.tokenizers.load import Tokenizer
from pipeline.decoding.batch import Generation
from pipeline.decoding.generation import finish_each, open_engine, prompt_tensor
from pipeline.decoding.options import DecodeOptions
from pipeline.decoding.prompts import PromptRow, Prompts, Share
from pipeline.decoding.text import INCOMPLETE, TextStream
from pipeline.model.transformer import Transformer
from tidar_common.errors import UserError

Advance = Callable[[int, int, int], None]
"""Called with the prompts done, all of them, and the new tokens."""

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
                    settings, identity, prompt = line["settings"], str(line["id"]), line["prompt"]
                except (ValueError, TypeError, KeyError) as error:
                    raise UserError(
                        f"output: {path}:{number} is not a line of tidar-generate; give another "
                        "file"
                    ) from error
                if settings != self.settings:
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
        except OSError as error:  # a file system without locks
            print(
                f"output: {path} cannot be locked ({error.strerror}); see to it that no other "
                "process writes it",
                file=sys.stderr,
            )
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


@dataclass
class Summary:
    """What one run of `generate_file` did."""

    tokens: int = 0
    forwards: int = 0
    answers: str = ""
    """Of all lines of the file: how many, and what ended them."""


def generate_file(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Prompts,
    output: Path,
    options: DecodeOptions,
    share: Share,
    advance: Advance,
) -> Summary:
    """Append one line to `output` for each prompt that has none yet, in the order they finish.

    A prompt's seed is the sampling's plus its number in the whole list, so an interrupted run and
    a whole one write the same texts, in any number of shares. A last line cut short by an
    interruption is dropped. Prompts are read twice, for their lengths and when a row is free.

    Args:
        model: what decodes.
        tokenizer: its tokenizer.
        prompts: this share's prompts. One that leaves no room for `max_new_tokens` gets a line
            without text.
        output: JSON lines (`answer_line`).
        options: how they are continued.
        share: which prompts of all these are.
        advance: called with the numbers of prompts done and of all, and the new tokens.

    Raises:
        UserError: when `output` holds lines of other settings, or is no such file, or when no
            prompt could have an answer of `max_new_tokens`.
    """
    room = model.config.max_positions - options.max_new_tokens
    if room < 1:
        raise UserError(
            f"max_new_tokens: {options.max_new_tokens} leave no room for a prompt in the model's "
            f"{model.config.max_positions} positions; give fewer"
        )
    summary = Summary()
    settings = fingerprint(options, model, prompts.settings)
    with open_answers(output, settings, prompts.text_of) as answers:

        def report() -> None:
            advance(len(answers.done), len(prompts), summary.tokens)

        waiting, longest = _waiting(tokenizer, prompts, answers, room)
        report()
        if waiting:
            for line, run in _answered(model, tokenizer, prompts, options, share, waiting, longest):
                answers.add(line)
                summary.tokens += len(run.tokens)
                summary.forwards += run.forwards
                report()
        summary.answers = str(answers)
    return summary


def _waiting(
    tokenizer: Tokenizer, prompts: Prompts, answers: Answers, room: int
) -> tuple[list[int], list[int]]:
    """Places of the prompts to answer, and the ids of the longest; a prompt of more than `room`
    tokens is skipped, with a line that says so."""
    waiting: list[int] = []
    longest: list[int] = []
    for place in range(len(prompts)):
        if prompts.id_of(place) in answers.done:
            continue
        row = prompts[place]
        ids = _ids(tokenizer, row)
        if len(ids) > room:
            answers.add(skipped_line(row))
            continue
        waiting.append(place)
        longest = max(longest, ids, key=len)
    return waiting, longest


def _ids(tokenizer: Tokenizer, row: PromptRow) -> list[int]:
    return tokenizer.encode(row.prompt) or [tokenizer.eos_id]


def _answered(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Prompts,
    options: DecodeOptions,
    share: Share,
    waiting: Sequence[int],
    longest: Sequence[int],
) -> Iterator[tuple[dict[str, Any], Generation]]:
    """The line of each prompt and what it came from, as they finish."""
    # Opened for the longest prompt in every row; they are read when a row is free.
    rows = min(options.batch_size, len(waiting))
    engine, _ = open_engine(model, [longest] * rows, options)
    asked: dict[int, tuple[PromptRow, list[int]]] = {}

    def read() -> Iterator[Tensor]:
        for index, place in enumerate(waiting):
            row = prompts[place]
            asked[index] = row, _ids(tokenizer, row)
            yield prompt_tensor(model, asked[index][1], options.max_new_tokens)

    seeds = [options.sampling.seed + share.number(place) for place in waiting]
    for index, run in finish_each(engine, read(), options, seeds=seeds):
        yield answer_line(*asked.pop(index), run, tokenizer), run


def fingerprint(options: DecodeOptions, model: Transformer, prompts: dict[str, Any]) -> str:
    """Changes with everything that the texts depend on, but the weights; `prompts` are the settings
    of the prompts."""
    values: dict[str, Any] = {
        "sampling": asdict(options.sampling),
        "method": options.method,
        "block_size": options.block_size,
        "max_new_tokens": options.max_new_tokens,
        "stop": () if options.stop is None else options.stop.strings,
        "blocks": options.blocks,
        "confidence": options.confidence,
        "model": model.config.to_dict(),
    }
    values |= {"prompts": prompts} if prompts else {}
    if options.draft_model is not None:
        values["draft_model"] = options.draft_model.config.to_dict()
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
