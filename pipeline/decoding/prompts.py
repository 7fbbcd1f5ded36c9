"""Many prompts from a JSON-lines file."""

import json
from dataclasses import dataclass
from pathlib import Path

from data_prep.errors import UserError


@dataclass(frozen=True)
class PromptRow:
    """One line: `{"prompt": "...", "id": "...", "category": "..."}`; only `prompt` is needed."""

    id: str
    """As given, else the line's number from 0."""
    prompt: str
    category: str | None = None


def read_prompts(path: Path, key: str) -> list[PromptRow]:
    """The prompts of `path` in order; empty lines are skipped.

    Raises:
        UserError: naming `key`, the file and the line that cannot be used, or an id given twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}: {path} is not a file of UTF-8 text ({error})") from error
    rows: list[PromptRow] = []
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            prompt = values["prompt"]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f'{key}: {path}:{number + 1}: not a JSON object with a "prompt" ({error!r})'
            ) from error
        if not isinstance(prompt, str):
            raise UserError(f'{key}: {path}:{number + 1}: "prompt" must be a text')
        category = values.get("category")
        rows.append(
            PromptRow(
                str(values.get("id", number)), prompt, None if category is None else str(category)
            )
        )
    if not rows:
        raise UserError(f"{key}: {path} holds no prompt")
    if len({row.id for row in rows}) < len(rows):
        raise UserError(f'{key}: {path}: an "id" stands there twice; make them different')
    return rows
