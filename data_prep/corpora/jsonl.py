"""JSON lines, plain or compressed (gzip, Zstandard): one document a line."""

import json
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import pairwise
from typing import IO, Any

from data_prep.corpora.base import DEFAULT_PART_BYTES, Corpus, Document, Part
from data_prep.corpora.files import File, find_files, open_binary, open_text_stream
from tidar_common.errors import UserError

DECODER = json.JSONDecoder()
COMPRESSED = (".gz", ".zst", ".zstd")
PATTERNS = tuple(f"*.jsonl{end}" for end in ("", *COMPRESSED))
OTHER_PATTERNS = tuple(f"*.json{end}" for end in ("", *COMPRESSED))
"""Names that files of lines also have, as those of C4; looked for where there is none of the usual
ones, beside which they are something else."""
ONE_A_LINE = "write one object a line (jq -c '.[]' of an array, jq -c . of others)"
UNPACKED = 4
"""How much larger compressed text is when unpacked, about; the size of a task depends on it."""


@dataclass(frozen=True)
class JsonlConfig:
    path: str
    """A file, or a folder whose *.jsonl, *.jsonl.gz and *.jsonl.zst are read, or where it has none
    of them its *.json, *.json.gz and *.json.zst; a path or a URL, with stars for several."""
    kind: str = "jsonl"
    """Which reader."""
    text_field: str = "text"
    """Field with the document's text."""
    id_field: str | None = None
    """Field with the document's id, which decides its split; None makes ids of file name and the
    byte a line starts at."""
    prompt_field: str | None = None
    """Field with a prompt that the text answers, for layout.loss_span=response; None has none."""
    cut_field: str | None = None
    """Field that is true where the text breaks off, so that it gets no end token; None ends all."""


class JsonlCorpus(Corpus):
    """A broken line or a missing field stops the preparation: it is named with file and line.
    A null is empty text.

    A part is a span of bytes of a file, with the lines that start in it. Compressed files cannot
    be entered in the middle and are one part each.
    """

    def __init__(self, config: JsonlConfig) -> None:
        self.config = config
        files = find_files(config.path, (*PATTERNS, *OTHER_PATTERNS), "corpus.path")
        lines = [file for file in files if any(fnmatch(file.path, p) for p in PATTERNS)]
        self.files = lines or files
        fields = {
            "text_field": config.text_field,
            "id_field": config.id_field,
            "prompt_field": config.prompt_field,
            "cut_field": config.cut_field,
        }
        self._needed = [(key, field) for key, field in fields.items() if field]

    @property
    def has_prompts(self) -> bool:
        return self.config.prompt_field is not None

    @property
    def total_bytes(self) -> int:
        return sum(map(_text_bytes, self.files))

    def parts(self, part_bytes: int = DEFAULT_PART_BYTES) -> list[Part]:
        pieces = []
        for file in self.files:
            place = ((file.path,), (file.name,))
            if file.path.endswith(COMPRESSED) or file.size <= part_bytes:
                pieces.append(Part(*place, _text_bytes(file), file.stamp))
                continue
            count = -(-file.size // part_bytes)
            bounds = [file.size * number // count for number in range(count + 1)]
            pieces += [
                Part(*place, end - start, file.stamp, start, end) for start, end in pairwise(bounds)
            ]
        return pieces

    def read_part(self, part: Part, refused: Counter[str]) -> Iterator[Document]:
        (path,), (name,) = part.paths, part.names
        for start, record in records_of(path, part.start, part.end):
            yield self._document(record, name, path, start)

    def _document(self, record: Any, name: str, path: str, start: int) -> Document:
        fields = self.config
        if not isinstance(record, dict):
            raise UserError(f"{line_at(path, start)}: {_kind(record)}, not an object; {ONE_A_LINE}")
        for key, needed in self._needed:
            if needed not in record:
                place = line_at(path, start)
                raise UserError(f"{place}: has no field {needed!r}; set corpus.{key}")
        text = record[fields.text_field]
        prompt = record[fields.prompt_field] if fields.prompt_field else None
        for field, value in ((fields.text_field, text), (fields.prompt_field, prompt)):
            if not isinstance(value, str | None):
                raise UserError(f"{line_at(path, start)}: field {field!r} is not text")
        identity = record[fields.id_field] if fields.id_field else f"{name}:{start}"
        if identity is None:
            place = line_at(path, start)
            raise UserError(f"{place}: field {fields.id_field!r} is null; mend or remove the line")
        cut = record[fields.cut_field] if fields.cut_field else False
        if not isinstance(cut, bool):
            raise UserError(
                f"{line_at(path, start)}: field {fields.cut_field!r} is neither true nor false"
            )
        return Document(str(identity), text or "", prompt=prompt or "", cut=cut)


def records_of(path: str, start: int = 0, end: int | None = None) -> Iterator[tuple[int, Any]]:
    """The JSON values of the lines that start in a span of a file's (unpacked) bytes, each with
    the byte that its line starts at; lines of white space have none.

    Raises:
        UserError: naming the line that is not JSON, or the file that ends early.
    """
    try:
        with open_text_stream(path) as file:
            for at, line in _lines(file, start, end):
                if line.isspace():
                    continue
                try:
                    record = _parsed(line)
                except (ValueError, RecursionError) as error:  # malformed UTF-8 is one, too
                    place = line_at(path, at)
                    if at == 0 and _opens_more(line.strip()):
                        raise UserError(
                            f"{place}: JSON over several lines; {ONE_A_LINE}"
                        ) from error
                    raise UserError(
                        f"{place}: not JSON ({error}); mend or remove the line"
                    ) from error
                yield at, record
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read to its end ({error})") from error


def _opens_more(line: bytes) -> bool:
    """Whether a file's first line looks like that of an array or object over several lines."""
    return line in (b"[", b"{", b"[{") or (line.startswith(b"[") and line.endswith(b","))


def _kind(value: Any) -> str:
    """What a JSON value is, for people."""
    return {list: "a JSON array", str: "a JSON string", type(None): "a JSON null"}.get(
        type(value), "a JSON number or truth value"
    )


def _parsed(line: bytes) -> Any:
    """`json.loads(line)`, which for a short line spends more time on asking for its encoding and
    for spaces around it than on its JSON."""
    try:
        text = line.decode()
        record, end = DECODER.raw_decode(text)
        if text[end:] in ("", "\n", "\r\n"):
            return record
    except ValueError:
        pass  # json.loads says what is wrong, or finds another encoding
    return json.loads(line)


def _text_bytes(file: File) -> int:
    return file.size * (UNPACKED if file.path.endswith(COMPRESSED) else 1)


def _lines(file: IO[bytes], start: int, end: int | None) -> Iterator[tuple[int, bytes]]:
    """The lines that start in the span, each with the byte it starts at."""
    position = start
    if start:
        file.seek(start - 1)
        position += len(file.readline()) - 1  # to the first line that starts in the span
    while end is None or position < end:
        line = file.readline()
        if not line:
            return
        yield position, line
        position += len(line)


def line_at(path: str, start: int) -> str:
    """File and number of the line that starts at a byte, counted now that somebody is to look."""
    with open_text_stream(path) if path.endswith(COMPRESSED) else open_binary(path) as file:
        number, position = 1, 0
        while position < start:
            position += len(file.readline())
            number += 1
    return f"{path}:{number}"
