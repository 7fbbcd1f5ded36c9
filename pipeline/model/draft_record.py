"""How often a model's drafts are accepted, as its last eval measured it: kept with the weights, so
that decoding need not find out anew for each answer.

A checkpoint reads it from the rows of its run's evals, an export carries it in `tidar.json`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any

from tidar_common import jsonlines
from tidar_common.run_files import DECODE_SPEED

TEMPERATURES = {"greedy": 0.0, "sampled": 1.0}
"""At which held-out text is scored, by the field of a `DraftRecord`."""


@dataclass(frozen=True)
class Acceptance:
    """Chances that a draft is accepted where it is reached, for positions 1 … K - 1 of the largest
    K to consider, each in [0, 1]."""

    block: Sequence[float]
    """Of drafts made with their block."""
    alone: Sequence[float] | None = None
    """Of drafts of a draft head without one; None where the model has no head."""

    @property
    def largest(self) -> int:
        """K"""
        return len(self.block) + 1

    @property
    def expected_tokens(self) -> float:
        """Of a forward with every block, 1 … K."""
        return 1 + sum(accumulate(self.block, mul))


@dataclass(frozen=True)
class DraftRecord:
    """Teacher-forced acceptance on held-out text; None at a temperature that was not scored."""

    greedy: Acceptance | None = None
    sampled: Acceptance | None = None

    def at(self, greedy: bool) -> Acceptance | None:
        """What to expect of greedy text, or of text drawn at any temperature."""
        return self.greedy if greedy else self.sampled

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> "DraftRecord":
        """Raises ValueError, TypeError or AttributeError for what `plain` does not give."""
        if not values.keys() <= TEMPERATURES.keys():
            raise ValueError(f"holds unknown fields ({', '.join(values)})")
        return cls(**{name: _acceptance(**measured) for name, measured in values.items()})


def record_of_run(run_dir: Path, step: int) -> DraftRecord | None:
    """By the last evals of a run up to optimizer step `step`; None where none scored drafts."""
    record: dict[str, Acceptance] = {}
    for row in _rows_up_to(run_dir, step):
        block, alone = row["teacher_forced_acceptance"], row.get("recurrent_acceptance")
        for name, temperature in TEMPERATURES.items():
            if row["temperature"] == temperature and _is_whole(block):
                record[name] = _acceptance(block, alone if _is_whole(alone) else None)
    return DraftRecord(**record) if record else None


def _rows_up_to(run_dir: Path, step: int) -> Iterable[Mapping[str, Any]]:
    for row in jsonlines.read_whole(run_dir / DECODE_SPEED):
        if row.get("teacher_forced_acceptance") and (row.get("step") or 0) <= step:
            yield row


def _is_whole(shares: Sequence[float | None] | None) -> bool:
    """Whether every position was scored."""
    return bool(shares) and None not in (shares or ())


def _acceptance(block: Iterable[float], alone: Iterable[float] | None = None) -> Acceptance:
    checked = [None if shares is None else tuple(map(float, shares)) for shares in (block, alone)]
    for shares in checked:
        if shares is not None and not all(0.0 <= share <= 1.0 for share in shares):
            raise ValueError("acceptance must lie between 0 and 1")
    assert checked[0] is not None, "drafts made with their block are always scored"
    return Acceptance(checked[0], checked[1])
