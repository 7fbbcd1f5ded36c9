"""Read a run directory as it is at this moment, finished or not."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tidar_common import jsonlines, run_files
from tidar_common.errors import UserError

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """What the files of a run directory say. Non-finite numbers are read as None."""

    name: str
    config: Row
    """The resolved config; empty when there is none."""
    config_text: str
    metrics: tuple[Row, ...]
    """One row per optimizer step, in order of step."""
    evals: tuple[Row, ...]
    """One row per (step, method, temperature), in order of step."""
    example: Row | None
    notices: tuple[str, ...]
    """What could not be read, for the page to say."""

    def setting(self, *names: str) -> Any:
        """The config value under nested keys, or None."""
        value: Any = self.config
        for name in names:
            if not isinstance(value, Mapping):
                return None
            value = value.get(name)
        return value

    @property
    def parameters(self) -> int | None:
        """Trainable parameters, where the run recorded them."""
        places = [self.setting("parameters"), self.setting("model", "parameters")]
        places += [row.get("parameters") for row in (*self.evals[-1:], *self.metrics[-1:])]
        return next((place for place in places if isinstance(place, int)), None)

    def column(self, name: str) -> list[tuple[float, float | None]]:
        """(step, value) of every optimizer step."""
        return [(row["step"], as_number(row.get(name))) for row in self.metrics]

    def eval_column(
        self, name: str, method: str, temperature: float
    ) -> list[tuple[float, float | None]]:
        """(step, value) of every eval of one method at one temperature."""
        return [
            (row["step"], as_number(row.get(name)))
            for row in self.evals
            if row["method"] == method and row["temperature"] == temperature
        ]

    def last_eval(self, method: str, temperature: float) -> Row | None:
        """The row of the latest eval, or None when that eval did not measure it."""
        for row in self.latest_rows():
            if row["method"] == method and row["temperature"] == temperature:
                return row
        return None

    @property
    def block_size(self) -> int | None:
        """K of the latest decoding by TiDAR; other methods have block lengths of their own."""
        sizes = (row.get("block_size") for row in reversed(self.evals) if row["method"] == "tidar")
        return next(sizes, None)

    def latest_rows(self) -> list[Row]:
        """All rows of the latest eval."""
        return [row for row in self.evals if row["step"] == self.evals[-1]["step"]]


def read_run(run_dir: Path) -> Run:
    """Read `run_dir`.

    Raises:
        UserError: when there is no such directory, or no metrics.jsonl with a whole line in it.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run directory; give the run_dir of a training run")
    notices: list[str] = []
    path = run_dir / run_files.METRICS
    if not path.is_file():
        raise UserError(f"{path}: does not exist; give a run_dir in which training has started")
    metrics = _read_rows(path, ("step",), notices)
    if not metrics:
        raise UserError(f"{path}: holds no complete line; wait for the first optimizer step")
    evals_path = run_dir / run_files.DECODE_SPEED
    keys = ("step", "method", "temperature")
    evals = _read_rows(evals_path, keys, notices) if evals_path.is_file() else []
    config, config_text = _read_config(run_dir / run_files.CONFIG, notices)
    return Run(
        name=run_dir.resolve().name,
        config=config,
        config_text=config_text,
        metrics=tuple(_last_of_each(metrics, ("step",))),
        evals=tuple(_last_of_each(evals, keys)),
        example=_read_example(run_dir / run_files.EXAMPLE, notices),
        notices=tuple(notices),
    )


def as_number(value: Any) -> float | None:
    """`value` if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def _read_rows(path: Path, keys: tuple[str, ...], notices: list[str]) -> list[Row]:
    """The JSON objects of a .jsonl file that have all `keys`.

    The last line may be half written, for the file belongs to a process that may be running or
    may have been killed: it is left out and needs no word. Any other bad line is left out too,
    and the page says so.
    """
    *lines, rest = path.read_text(encoding="utf-8", errors="replace").split("\n")
    if _has_all(jsonlines.whole_object(rest), keys):
        lines.append(rest)
    rows: list[Row] = []
    bad = []
    for number, line in enumerate(lines, start=1):
        row = jsonlines.whole_object(line)
        if row is not None and _has_all(row, keys):
            rows.append(row)
        elif line.strip():
            bad.append(number)
    if bad:
        notices.append(
            f"{path.name}: {len(bad)} of {len(lines)} lines could not be read and are left out, "
            f"the first is line {bad[0]}."
        )
    return rows


def _has_all(row: Row | None, keys: tuple[str, ...]) -> bool:
    return row is not None and set(keys) <= row.keys() and as_number(row["step"]) is not None


def _last_of_each(rows: list[Row], keys: tuple[str, ...]) -> list[Row]:
    """The last row for each value of `keys`, in order of step: a resumed run may repeat an eval."""
    latest = {tuple(row[key] for key in keys): row for row in rows}
    return sorted(latest.values(), key=lambda row: row["step"])


def _read_config(path: Path, notices: list[str]) -> tuple[Row, str]:
    if not path.is_file():
        notices.append("config.yaml is missing, so the settings of this run are not shown.")
        return {}, ""
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError:
        config = None
    if not isinstance(config, dict):
        notices.append("config.yaml is not valid YAML; it is shown below as it stands.")
        return {}, text
    return config, text


def _read_example(path: Path, notices: list[str]) -> Row | None:
    if not path.is_file():
        return None
    example = jsonlines.whole_object(path.read_text(encoding="utf-8", errors="replace"))
    tokens = example.get("tokens") if example else None
    whole = isinstance(tokens, list) and all(
        isinstance(token, dict) and {"text", "forward"} <= token.keys() for token in tokens
    )
    if not whole:
        notices.append("evals/example.json could not be read, so no generation is shown.")
        return None
    return example
