"""Texts of one's own, by source, as the likelihood eval scores them."""

import json
from pathlib import Path

import numpy as np

from data_prep.formats.groups import PackedSequence
from data_prep.layout import build_layout
from data_prep.tokenizers.load import Tokenizer
from tidar_common.errors import UserError

KEY = "evals.likelihood.texts_file"


def read_texts(
    path: Path, tokenizer: Tokenizer, longest: int, block_size: int
) -> dict[str, list[PackedSequence]]:
    """The texts of a file of JSON lines, `{"text": "...", "source": "..."}`, by source.

    Each text ends with the end token, as a document in training. One that is longer than `longest`
    tokens is cut into pieces, each a sequence without padding, drafted in full on a grid from its
    start. Without a "source" it is `text`.

    Raises:
        UserError: naming the file and the line that cannot be used.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{KEY}: {path} is not a file of UTF-8 text ({error})") from error
    found: dict[str, list[PackedSequence]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text, source = row["text"], str(row.get("source", "text"))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f'{KEY}: {path}:{number}: not a JSON object with a "text" ({error!r})'
            ) from error
        if not isinstance(text, str):
            raise UserError(f'{KEY}: {path}:{number}: "text" must be a text')
        ids = np.array([*tokenizer.encode(text), tokenizer.eos_id])
        pieces = [ids[start : start + longest] for start in range(0, len(ids), longest)]
        found.setdefault(source, []).extend(_sequence(piece, block_size) for piece in pieces)
    if not found:
        raise UserError(f"{KEY}: {path} holds no text")
    return found


def _sequence(tokens: np.ndarray, block_size: int) -> PackedSequence:
    lengths = [len(tokens)]
    return PackedSequence(tokens, np.array(lengths), build_layout(lengths, block_size))
