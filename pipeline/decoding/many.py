"""Many prompts from a JSON-lines file to another, resumable after any interruption."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.tokenizers import Tokenizer
from pipeline.decoding.choice import Choice
from pipeline.decoding.generate import Generation, finish_each, open_engine
from pipeline.decoding.methods import CONFIDENCE
from pipeline.decoding.prompts import PromptRow
from pipeline.decoding.sampling import Sampling
from pipeline.decoding.stops import StopStrings
from pipeline.decoding.text import TextStream
from pipeline.model.transformer import Transformer


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

    def fingerprint(self, model: Transformer) -> str:
        """Changes with everything that the texts depend on, but the weights."""
        left_out = ("batch_size", "draft_model", "on_choice")
        values: dict[str, Any] = {
            item.name: getattr(self, item.name)
            for item in fields(self)
            if item.name not in left_out
        }
        values |= {"sampling": asdict(self.sampling), "model": model.config.to_dict()}
        if self.draft_model is not None:
            values["draft_model"] = self.draft_model.config.to_dict()
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def generate_file(
    model: Transformer,
    tokenizer: Tokenizer,
    rows: Sequence[PromptRow],
    output: Path,
    options: ManyOptions,
    advance: Callable[[int, int], None],
) -> tuple[int, int]:
    """Append one line to `output` for each prompt that has none yet, in the order they finish.

    A prompt's seed is the sampling's plus its place in the file, so an interrupted run and a whole
    one write the same texts. A last line cut short by an interruption is dropped.

    Args:
        model: what decodes.
        tokenizer: its tokenizer.
        rows: the prompts.
        output: JSON lines: id, category, prompt, text, tokens, forwards, tokens_per_forward,
            seconds, stopped_by, settings.
        options: how they are continued.
        advance: called with the numbers of prompts done and of all.

    Returns:
        New tokens and forwards of the prompts decoded now.

    Raises:
        UserError: when `output` holds lines of other settings, or is no such file.
    """
    settings = options.fingerprint(model)
    done = _finished(output, settings)
    waiting = [number for number, row in enumerate(rows) if row.id not in done]
    advance(len(rows) - len(waiting), len(rows))
    if not waiting:
        return 0, 0
    ids = [tokenizer.encode(rows[number].prompt) or [tokenizer.eos_id] for number in waiting]
    engine, prompts = open_engine(
        model,
        ids,
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
    finished = finish_each(
        engine,
        prompts,
        seeds=[options.sampling.seed + number for number in waiting],
        max_new_tokens=options.max_new_tokens,
        eos_id=tokenizer.eos_id,
        stop=StopStrings(tokenizer, options.stop) if options.stop else None,
    )
    tokens = forwards = 0
    with output.open("a", encoding="utf-8") as file:
        for count, (index, run) in enumerate(finished, 1):
            row = rows[waiting[index]]
            line = _line(row, ids[index], run, tokenizer) | {"settings": settings}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            tokens, forwards = tokens + len(run.tokens), forwards + run.forwards
            advance(len(rows) - len(waiting) + count, len(rows))
    return tokens, forwards


def _line(
    row: PromptRow, prompt: list[int], run: Generation, tokenizer: Tokenizer
) -> dict[str, Any]:
    text = run.text
    if text is None:
        decoder = TextStream(tokenizer, prompt)
        text = decoder.add(run.tokens) + decoder.end()
    return {
        "id": row.id,
        "category": row.category,
        "prompt": row.prompt,
        "text": text,
        "tokens": len(run.tokens),
        "forwards": run.forwards,
        "tokens_per_forward": run.tokens_per_forward,
        "seconds": run.seconds,
        "stopped_by": run.stopped_by,
    }


def _finished(output: Path, settings: str) -> set[str]:
    """Ids that `output` has whole lines for; a part of a line at its end is cut off."""
    if not output.exists():
        return set()
    content = output.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    ids = set()
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            values = json.loads(line)
            own, known = values["settings"], str(values["id"])
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"output: {output}:{number} is not a line of tidar-generate; give another file"
            ) from error
        if own != settings:
            raise UserError(
                f"output: {output} holds texts of another model or other settings; give another "
                "file, or delete it"
            )
        ids.add(known)
    if len(whole) < len(content):
        with output.open("r+b") as file:
            file.truncate(len(whole))
    return ids
