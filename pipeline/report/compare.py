"""Two runs step by step: whether they are bit-equal, at which step they first differ, and by how
much at most."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.training.moments import CLOCK
from tidar_common.errors import UserError
from tidar_common.figures import Chart, Series, chart_grid
from tidar_common.files import write_text_atomic
from tidar_common.jsonlines import Row, parse_strictly
from tidar_common.page import Section, page
from tidar_common.run_files import METRICS


@dataclass(frozen=True)
class Comparison:
    """What two runs have in common, and where they part."""

    steps: list[int]
    """Steps that both have."""
    only: tuple[list[int], list[int]]
    """Steps that only the first, only the second has."""
    first_differing: int | None
    """The first common step at which any compared key differs; None when all are equal."""
    differing_keys: list[str]
    """The keys that differ there."""
    data_differs_at: int | None
    """The first common step up to which they did not see the same data."""
    differences: list[float]
    """|a - b| / |a| of the key in question, for each of `steps`."""

    @property
    def equal(self) -> bool:
        """Bit for bit."""
        return self.first_differing is None and not any(self.only)

    def near(self, tolerance: float) -> bool:
        """Whether the same steps saw the same data, and the key is as near as `tolerance`."""
        if any(self.only) or self.data_differs_at is not None:
            return False
        return bool(self.steps) and max(self.differences) <= tolerance


def compare(first: Path, second: Path, key: str) -> Comparison:
    """Compare the `metrics.jsonl` of two run directories; relative differences are those of `key`.

    Raises:
        UserError: when a file is missing, is not JSON lines, or has no such key.
    """
    left, right = read_metrics(first, key), read_metrics(second, key)
    steps = sorted(left.keys() & right.keys())
    differing: list[str] = []
    first_differing = data_differs_at = None
    for step in steps:
        a, b = left[step], right[step]
        keys = [name for name in a if name not in CLOCK and a[name] != b.get(name)]
        if keys and first_differing is None:
            first_differing, differing = step, keys
        if data_differs_at is None and a["data_digest"] != b["data_digest"]:
            data_differs_at = step
    return Comparison(
        steps=steps,
        only=(sorted(left.keys() - right.keys()), sorted(right.keys() - left.keys())),
        first_differing=first_differing,
        differing_keys=differing,
        data_differs_at=data_differs_at,
        differences=[relative(left[step][key], right[step][key]) for step in steps],
    )


def read_metrics(run_dir: Path, key: str) -> dict[int, Row]:
    """The rows of a run by step."""
    path = run_dir / METRICS
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read; give a run directory ({error})") from error
    rows: dict[int, Row] = {}
    for number, row in parse_strictly(lines, path):
        if not isinstance(row.get(key), int | float):
            raise UserError(f"{path}:{number}: has no number {key!r}; choose another with --key")
        if not isinstance(row.get("step"), int) or "data_digest" not in row:
            raise UserError(f"{path}:{number}: is not a step of a run; give a run directory")
        rows[row["step"]] = row
    return rows


def relative(a: float, b: float) -> float:
    """|a - b| as a share of |a|."""
    return abs(a - b) / max(abs(a), 1e-300)


def describe(comparison: Comparison, key: str) -> str:
    """The comparison in a few lines."""
    lines = [f"{len(comparison.steps)} common steps"]
    for which, steps in zip(("first", "second"), comparison.only, strict=True):
        if steps:
            lines.append(f"{len(steps)} steps only in the {which} run, from {steps[0]}")
    if comparison.first_differing is None:
        lines.append("bit-equal in every key but the clock's")
    else:
        keys = ", ".join(comparison.differing_keys)
        lines.append(f"first differing step {comparison.first_differing} ({keys})")
        worst = max(range(len(comparison.steps)), key=lambda n: comparison.differences[n])
        lines.append(
            f"largest relative difference of {key}: {comparison.differences[worst]:.3g} "
            f"at step {comparison.steps[worst]}"
        )
    if comparison.data_differs_at is None:
        lines.append("the same data")
    else:
        lines.append(f"different data from step {comparison.data_differs_at} on")
    return "\n".join(lines)


def draw(comparison: Comparison, key: str, path: Path, title: str) -> None:
    """Write a page with the differences over the steps."""
    series = Series(key, list(zip(comparison.steps, comparison.differences, strict=True)), "ar")
    label = f"relative difference of {key}"
    charts = chart_grid([Chart(label, [series], "step", label)])
    lines = describe(comparison, key).splitlines()
    write_text_atomic(path, page(title, [Section("", charts)], paragraphs=lines))
