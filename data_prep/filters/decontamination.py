"""Documents that hold some of an eval's text: n-grams of words that stand in both.

Case, punctuation, accents and the values of numbers do not count (datatrove's `simplify_text`).
"""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from data_prep.corpora.files import File, find_files, open_text_stream
from data_prep.corpora.jsonl import PATTERNS, line_at, records_of
from data_prep.filters.config import DecontaminateConfig
from tidar_common.errors import UserError


@dataclass
class EvalInfo:
    """One eval, as the manifest records it."""

    sha256: str
    """Over its files."""
    texts: int = 0
    too_short: int = 0
    """Texts of fewer than n words, which cannot be looked for."""


class EvalIndex:
    """The n-grams of all evals; a text of fewer than n words has none."""

    def __init__(self, config: DecontaminateConfig) -> None:
        self.config = config
        self.infos: dict[str, EvalInfo] = {}
        self._eval_of: dict[str, str] = {}
        for name, path in sorted((config.evals or {}).items()):
            files = eval_files(name, path)
            info = self.infos[name] = EvalInfo(files_sha256(files))
            for file in files:
                for text in _texts(file.path, config.fields):
                    grams = self._n_grams(text)
                    info.texts += 1
                    info.too_short += not grams
                    for gram in grams:
                        self._eval_of.setdefault(gram, name)
            if info.texts == info.too_short:
                raise UserError(
                    f"decontaminate.evals.{name}: {path} has no text of {config.n_grams} words; "
                    "set decontaminate.fields, or fewer decontaminate.n_grams"
                )

    def found_in(self, text: str) -> tuple[str, str] | None:
        """The eval and the n-gram of it that stands first in `text`."""
        if not self._eval_of:
            return None
        for gram in self._n_grams(text):
            if (name := self._eval_of.get(gram)) is not None:
                return name, gram
        return None

    def described(self) -> dict[str, Any]:
        return {name: asdict(info) for name, info in self.infos.items()}

    def _n_grams(self, text: str) -> list[str]:
        from datatrove.utils.text import ngrams, simplify_text

        from data_prep.filters.words import plain_words

        words = plain_words().word_tokenize(simplify_text(text))
        return [" ".join(gram) for gram in ngrams(words, self.config.n_grams)]


def eval_files(name: str, path: str) -> list[File]:
    """The files of an eval; UserError naming the key where there are none."""
    return find_files(path, PATTERNS, f"decontaminate.evals.{name}")


def files_sha256(files: list[File]) -> str:
    """SHA-256 over the contents of `files`, one behind the other."""
    digest = hashlib.sha256()
    for file in files:
        try:
            with open_text_stream(file.path) as stream:
                while chunk := stream.read(1 << 20):
                    digest.update(chunk)
        except (OSError, EOFError) as error:
            raise UserError(f"{file.path}: cannot be read to its end ({error})") from error
    return digest.hexdigest()


def _texts(path: str, fields: list[str] | None) -> Iterator[str]:
    for start, record in records_of(path):
        if not isinstance(record, dict):
            place = line_at(path, start)
            raise UserError(f"{place}: is not an object with fields; mend the line")
        if fields is None:
            yield from _strings(record)
            continue
        for field in fields:
            if field not in record:
                place = line_at(path, start)
                raise UserError(f"{place}: has no field {field!r}; set decontaminate.fields")
            yield from _strings(record[field])


def _strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)
