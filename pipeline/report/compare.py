"""Compare two runs step by step: `python -m pipeline.report.compare RUN_A RUN_B`.

Says whether they are bit-equal, at which step they first differ, and by how much at most.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.training.moments import CLOCK
from tidar_common.cli import telling_mistakes
from tidar_common.errors import UserError
from tidar_common.figures import Chart, Series, chart_grid
from tidar_common.files import write_text_atomic
from tidar_common.page import Section, page

EXIT_DIFFERENT = 1


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
        return self.first_differing is None and not any(self.only)


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


def read_metrics(run_dir: Path, key: str) -> dict[int, dict[str, Any]]:
    """The rows of a run by step."""
    path = run_dir / "metrics.jsonl"
    found: dict[int, dict[str, Any]] = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            float(row[key])
            found[int(row["step"])] = row
    except OSError as error:
        raise UserError(f"{path}: cannot be read; give a run directory ({error})") from error
    except KeyError as error:
        raise UserError(f"{path}: has no key {error}; choose another with --key") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: is not the metrics of a run ({error})") from error
    return found


def relative(a: float, b: float) -> float:
    """|a - b| as a share of |a|."""
    return abs(a - b) / max(abs(a), 1e-300)


def describe(found: Comparison, key: str) -> str:
    """The comparison in a few lines."""
    lines = [f"{len(found.steps)} common steps"]
    for which, steps in zip(("first", "second"), found.only, strict=True):
        if steps:
            lines.append(f"{len(steps)} steps only in the {which} run, from {steps[0]}")
    if found.first_differing is None:
        lines.append("bit-equal in every key but the clock's")
    else:
        keys = ", ".join(found.differing_keys)
        lines.append(f"first differing step {found.first_differing} ({keys})")
        worst = max(range(len(found.steps)), key=lambda n: found.differences[n])
        lines.append(
            f"largest relative difference of {key}: {found.differences[worst]:.3g} "
            f"at step {found.steps[worst]}"
        )
    if found.data_differs_at is None:
        lines.append("the same data")
    else:
        lines.append(f"different data from step {found.data_differs_at} on")
    return "\n".join(lines)


def draw(found: Comparison, key: str, path: Path, title: str) -> None:
    """Write a page with the differences over the steps."""
    series = Series(key, list(zip(found.steps, found.differences, strict=True)), "ar")
    label = f"relative difference of {key}"
    charts = chart_grid([Chart(label, [series], "step", label)])
    lines = describe(found, key).splitlines()
    write_text_atomic(path, page(title, [Section("", charts)], paragraphs=lines))


@telling_mistakes
def main(arguments: Sequence[str] | None = None) -> int:
    """Print the comparison; returns 0 if equal or within --tolerance, 1 if not, 2 on mistakes."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.report.compare", description=__doc__)
    parser.add_argument("first", type=Path, help="a run directory")
    parser.add_argument("second", type=Path, help="another")
    parser.add_argument("--key", default="loss", help="of metrics.jsonl (default loss)")
    parser.add_argument("--plot", type=Path, help="write the differences as a page (HTML) here")
    parser.add_argument(
        "--tolerance", type=float, default=0.0,
        help="largest relative difference that still counts as equal (default 0: bit for bit)",
    )  # fmt: skip
    given = parser.parse_args(arguments)
    found = compare(given.first, given.second, given.key)
    print(describe(found, given.key))
    if given.plot is not None:
        draw(found, given.key, given.plot, f"{given.first} and {given.second}")
    close = bool(found.steps) and max(found.differences) <= given.tolerance
    near = given.tolerance > 0 and close and not any(found.only) and found.data_differs_at is None
    return 0 if found.equal or near else EXIT_DIFFERENT


if __name__ == "__main__":
    sys.exit(main())
