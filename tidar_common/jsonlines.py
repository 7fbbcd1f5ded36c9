"""JSON lines: a JSON object a line, appended whole, read leniently or strictly."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tidar_common.errors import UserError

Row = dict[str, Any]


def append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add one line per row, in a single write: a crash can tear the last line only."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def read_whole(path: Path) -> list[Row]:
    """The whole objects of a file that somebody may be writing, or was when it died; other lines
    are left out, and there are none where there is no file."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return [row for line in lines if (row := whole_object(line)) is not None]


def whole_object(line: str) -> Row | None:
    """The object that `line` holds, None where it is anything else."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def parse_strictly(lines: Iterable[str], path: Path | str) -> Iterator[tuple[int, Row]]:
    """Number (from 1) and object of every line that is not blank.

    Raises:
        UserError: for a line that holds no JSON object, naming file and line.
    """
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: not JSON ({error}); mend the line") from error
        if not isinstance(value, dict):
            raise UserError(f"{path}:{number}: not a JSON object; mend the line")
        yield number, value
