"""Sequences that a run goes on without: those of a spike from which it went back to a checkpoint.

They are kept in `left_out.json` of the run directory, written before the checkpoint is loaded, so
that a crash at any moment finds them again; and, as ranges, in every later checkpoint.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.distributed import World
from tidar_common.errors import UserError
from tidar_common.files import write_text_atomic

LEFT_OUT = "left_out.json"
Range = tuple[int, int]
"""First order number, and the one behind the last."""


@dataclass(frozen=True)
class LeftOut:
    """Why some sequences are left out."""

    first_sequence: int
    last_sequence: int
    """Order numbers of the run, both included."""
    step: int
    """The step that spiked."""
    to_step: int
    """That of the checkpoint which the run went back to."""
    quantity: str
    """`loss` or `grad_norm`."""
    value: float
    score: float

    @property
    def range(self) -> Range:
        return self.first_sequence, self.last_sequence + 1


class LeftOutFile:
    """The list of a run directory; the same on all ranks, which call each method together.

    Raises:
        UserError: on all ranks, when the file is there and damaged.
    """

    def __init__(self, run_dir: Path, world: World) -> None:
        self.path = run_dir / LEFT_OUT
        self.world = world
        entries, problem = world.from_main(self._read() if world.is_main else None)
        if problem is not None:
            raise UserError(problem)
        self.entries: list[LeftOut] = entries

    def ranges(self, known: Iterable[Range]) -> list[Range]:
        """All ranges to leave out, those `known` from a checkpoint among them."""
        return merged([*known, *(entry.range for entry in self.entries)])

    def rollbacks_to(self, step: int) -> int:
        """How often the run went back to the checkpoint of `step`."""
        return sum(entry.to_step == step for entry in self.entries)

    def add(self, entry: LeftOut) -> str | None:
        """Write `entry` to disk; returns why that cannot be, if so."""
        self.entries.append(entry)
        return self.world.from_main(self._write() if self.world.is_main else None)

    def _read(self) -> tuple[list[LeftOut], str | None]:
        if not self.path.exists():
            return [], None
        try:
            rows: list[dict[str, Any]] = json.loads(self.path.read_text())
            return [LeftOut(**row) for row in rows], None
        except (OSError, ValueError, TypeError) as error:
            return [], (
                f"{self.path}: is damaged ({error}); restore it, or delete it to train on the "
                "sequences that it names"
            )

    def _write(self) -> str | None:
        try:
            rows = [asdict(entry) for entry in self.entries]
            write_text_atomic(self.path, json.dumps(rows, indent=1) + "\n")
        except OSError as error:
            return f"{self.path}: cannot be written ({error})"
        return None


def merged(ranges: Iterable[Range]) -> list[Range]:
    """The same numbers as sorted ranges that neither overlap nor touch."""
    found: list[Range] = []
    for first, end in sorted(ranges):
        if found and first <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((first, end))
    return found
