"""Prompts from the command line, from a text file, or many from a JSON-lines file."""

import json
import sys
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


def read_prompt(prompt: str, prompt_file: str | None) -> str:
    """The text to continue: `prompt`, standard input for `-`, or the content of `prompt_file`."""
    if prompt_file is None:
        return sys.stdin.read() if prompt == "-" else prompt
    if prompt:
        raise UserError("prompt: given together with prompt_file; use one of them")
    path = Path(prompt_file).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompt_file: {path} is not a file of UTF-8 text ({error})") from error


def prompt_rows(prompts_file: str | None) -> list[PromptRow]:
    """The prompts of `tidar-generate prompts_file=...`."""
    assert prompts_file is not None, "the caller looks"
    return read_prompts(Path(prompts_file).expanduser(), "prompts_file")


def output_file(output: str | None) -> Path:
    """Where their texts go; raises UserError when none is given, or its folder is not there."""
    if output is None:
        raise UserError("output: prompts_file needs one; give a .jsonl file for the texts")
    path = Path(output).expanduser()
    if not path.parent.is_dir():
        raise UserError(f"output: {path.parent} is not a folder; make it first")
    return path
