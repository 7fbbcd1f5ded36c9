"""A benchmark's outcome: printed as a table, written as JSON."""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bench.measure import Samples, Work, interleaved, peak_bytes, ratio
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


@dataclass(frozen=True)
class Bench:
    """How a benchmark measures, and what came of it."""

    device: torch.device
    rounds: int
    warmup: int
    outcome: Outcome = field(default_factory=Outcome)

    def time(self, works: Mapping[str, Work], prefix: str = "") -> dict[str, Samples]:
        """Run `works` in turns; their times stand under their names behind `prefix`."""
        samples = interleaved(works, rounds=self.rounds, warmup=self.warmup, device=self.device)
        self.outcome.add(samples, prefix)
        return samples

    def weigh(self, works: Mapping[str, Work], prefix: str = "") -> None:
        """The peak memory of each of `works`, which have been timed."""
        for name, work in works.items():
            peak = peak_bytes(work, self.device)
            self.outcome.variants[prefix + name]["peak_bytes"] = peak
            self.outcome.figures[f"{prefix}{name}: peak MB"] = peak / 1e6

    def divide(
        self, samples: Mapping[str, Samples], name: str, by: str, prefix: str = "",
        **target: float | None,
    ) -> dict[str, Any]:  # fmt: skip
        """The ratio of two variants, with its target as in `ratio`; returns it."""
        pair = ratio(samples[name], samples[by], **target)
        self.outcome.ratios[f"{prefix}{name} / {by}"] = pair
        return pair


def write(benchmark: str, device: torch.device, folder: Path, module: str, **content: Any) -> Path:
    """Write `content` and where it comes from to `<benchmark>-<device type>.json` in `folder`, all
    or nothing; returns its path. `module` is what `python -m` runs, or a whole command."""
    command = module if " " in module else shlex.join(["python", "-m", module, *sys.argv[1:]])
    head = {
        "benchmark": benchmark,
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": revision(),
        "machine": machine(device),
    }
    path = folder / f"{benchmark}-{device.type}.json"
    write_text_atomic(path, json.dumps(head | content, indent=1) + "\n")
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
