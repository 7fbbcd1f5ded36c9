"""Many prompts to a file of answers, resumable after any interruption."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from data_prep.tokenizers.load import Tokenizer
from pipeline.decoding.answers import Answers, answer_line, open_answers, skipped_line
from pipeline.decoding.choice import Choice
from pipeline.decoding.generate import Generation, finish_each, open_engine
from pipeline.decoding.methods import CONFIDENCE, prompt_tensor
from pipeline.decoding.prompts import PromptRow, Prompts
from pipeline.decoding.sampling import Sampling
from pipeline.decoding.shares import Share
from pipeline.decoding.stops import StopStrings
from pipeline.model.transformer import Transformer
from tidar_common.errors import UserError

Advance = Callable[[int, int, int], None]
"""Told the prompts done, all of them, and the new tokens."""


@dataclass(frozen=True)
class ManyOptions:
    """How every prompt of a file is continued."""

    sampling: Sampling
    method: str = "tidar"
    block_size: int | None = None
    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()
    batch_size: int = 1
    blocks: tuple[int, ...] | str | None = None
    """As in `generate`; with `auto`, drawn texts are not those of an uninterrupted run."""
    draft_model: Transformer | None = None
    confidence: float = CONFIDENCE
    on_choice: Callable[[Choice], None] = lambda choice: None

    def fingerprint(self, model: Transformer, prompts: dict[str, Any]) -> str:
        """Changes with everything that the texts depend on, but the weights; `prompts` are the
        settings of the prompts."""
        left_out = ("batch_size", "draft_model", "on_choice")
        values: dict[str, Any] = {
            item.name: getattr(self, item.name)
            for item in fields(self)
            if item.name not in left_out
        }
        values |= {"sampling": asdict(self.sampling), "model": model.config.to_dict()}
        values |= {"prompts": prompts} if prompts else {}
        if self.draft_model is not None:
            values["draft_model"] = self.draft_model.config.to_dict()
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


@dataclass
class Made:
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
    options: ManyOptions,
    share: Share,
    advance: Advance,
) -> Made:
    """Append one line to `output` for each prompt that has none yet, in the order they finish.

    A prompt's seed is the sampling's plus its number in the whole list, so an interrupted run and
    a whole one write the same texts, in any number of shares. A last line cut short by an
    interruption is dropped. Prompts are read twice, for their lengths and when a row is free.

    Args:
        model: what decodes.
        tokenizer: its tokenizer.
        prompts: this share's prompts. One that leaves no room for `max_new_tokens` gets a line
            without text.
        output: JSON lines (`answers.answer_line`).
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
    made = Made()
    settings = options.fingerprint(model, prompts.settings)
    with open_answers(output, settings, prompts.text_of) as answers:

        def tell() -> None:
            advance(len(answers.done), len(prompts), made.tokens)

        waiting, longest = _waiting(tokenizer, prompts, answers, room)
        tell()
        if waiting:
            for line, run in _answered(model, tokenizer, prompts, options, share, waiting, longest):
                answers.add(line)
                made.tokens += len(run.tokens)
                made.forwards += run.forwards
                tell()
        made.answers = str(answers)
    return made


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
    options: ManyOptions,
    share: Share,
    waiting: Sequence[int],
    longest: Sequence[int],
) -> Iterator[tuple[dict[str, Any], Generation]]:
    """The line of each prompt and what it came from, as they finish."""
    # Opened for the longest prompt in every row; they are read when a row is free.
    engine, _ = open_engine(
        model,
        [longest] * min(options.batch_size, len(waiting)),
        batch_size=options.batch_size,
        method=options.method,
        block_size=options.block_size,
        max_new_tokens=options.max_new_tokens,
        sampling=options.sampling,
        blocks=options.blocks,
        draft_model=options.draft_model,
        confidence=options.confidence,
        on_choice=options.on_choice,
    )
    asked: dict[int, tuple[PromptRow, list[int]]] = {}

    def read() -> Iterator[Tensor]:
        for index, place in enumerate(waiting):
            row = prompts[place]
            asked[index] = row, _ids(tokenizer, row)
            yield prompt_tensor(model, asked[index][1], options.max_new_tokens)

    finished = finish_each(
        engine,
        read(),
        seeds=[options.sampling.seed + share.number(place) for place in waiting],
        max_new_tokens=options.max_new_tokens,
        eos_id=tokenizer.eos_id,
        stop=StopStrings(tokenizer, options.stop) if options.stop else None,
    )
    for index, run in finished:
        yield answer_line(*asked.pop(index), run, tokenizer), run
