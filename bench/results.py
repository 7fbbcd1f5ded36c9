"""A benchmark's outcome: printed as a table, written as JSON."""

import json
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bench.measure import Samples
from tidar_common.files import write_text_atomic
from tidar_common.tables import Table, significant

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


@dataclass
class Outcome:
    """What a benchmark found."""

    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Times of each variant, and what else belongs to it."""
    ratios: dict[str, dict[str, Any]] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    """Numbers derived from the times, and sizes that they depend on."""

    def add(self, samples: dict[str, Samples], prefix: str = "") -> None:
        for name, timed in samples.items():
            self.variants[prefix + name] = timed.summary()


def write(
    outcome: Outcome,
    benchmark: str,
    options: Any,
    device: torch.device,
    folder: Path,
    module: str = "bench",
) -> Path:
    """Write `<benchmark>-<device type>.json` into `folder`, all or nothing; returns its path.
    `module` is what `python -m` runs."""
    content = {
        "benchmark": benchmark,
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": revision(),
        "machine": machine(device),
        "options": asdict(options),
        **asdict(outcome),
    }
    path = folder / f"{benchmark}-{device.type}.json"
    write_text_atomic(path, json.dumps(content, indent=1) + "\n")
    return path


def machine(device: torch.device) -> dict[str, Any]:
    """Where the numbers come from; what cannot be found out is null."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "cpu": cpu_model(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "load_average": load,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.platform(terse=True),
    }


def cpu_model() -> str | None:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or None)


def revision() -> str | None:
    """The git revision, with `-dirty` when files other than results differ; null outside git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ".", ":!bench/results")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def table(outcome: Outcome) -> str:
    """The outcome for a reader: times in milliseconds, ratios with their spread and target."""
    times = []
    for name, variant in outcome.variants.items():
        seconds = [variant["wall_seconds"][key] for key in ("min", "median", "max")]
        seconds.append(variant["cpu_seconds"]["median"])
        times.append([name, *(f"{1e3 * value:.2f}" for value in seconds)])
    numbers = [[name, _ratio_line(value)] for name, value in outcome.ratios.items()]
    numbers += [[name, significant(value)] for name, value in outcome.figures.items()]
    parts = [Table(("", "wall ms: min", "median", "max", "CPU median"), times)] if times else []
    return "\n".join(part.text() for part in [*parts, Table((), numbers, left=(0, 1))])


def _ratio_line(value: dict[str, Any]) -> str:
    wall = value["wall"]
    low, high = wall["per_round"]["min"], wall["per_round"]["max"]
    text = f"{wall['of_medians']:.3f} (rounds {low:.3f} to {high:.3f})"
    text += f", by CPU time {value['cpu']['of_medians']:.3f}"
    if "at_most" in value:
        text += f"; target at most {value['at_most']:g}"
    if "at_least" in value:
        text += f"; target at least {value['at_least']:g}"
    return text
