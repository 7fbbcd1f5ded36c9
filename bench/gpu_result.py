"""What `bench/gpu_train.sh` found, as one JSON file."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from bench.results import RESULTS, write
from tidar_common.jsonlines import read_whole
from tidar_common.run_files import METRICS

RUNS = ("ar", "tidar", "twin")


def collect(work: Path) -> dict[str, Any]:
    """Figures of the finished runs and evaluations below `work`."""
    scores = {name: json.loads((work / f"{name}.json").read_text()) for name in ("twin", "tidar")}
    bits = {name: scored["likelihood"]["bits_per_byte"] for name, scored in scores.items()}
    text = work / "text" / "text.json"
    return {
        "corpus": json.loads(text.read_text()) if text.is_file() else None,
        "runs": {name: training(work / name) for name in RUNS},
        "likelihood": {name: scored["likelihood"] for name, scored in scores.items()},
        "bits_per_byte_over_twin": bits["tidar"] / bits["twin"],
        "decode_speed": scores["tidar"]["decode_speed"],
    }


def training(run_dir: Path) -> dict[str, Any]:
    """Steps, tokens, losses and speed of a run."""
    rows = read_whole(run_dir / METRICS)
    last = rows[-1]
    speeds = sorted(row["tokens_per_second"] for row in rows)
    return {
        "steps": last["step"],
        "clean_tokens": last["tokens"],
        "seconds": sum(row["step_seconds"] for row in rows),
        "tokens_per_second": speeds[len(speeds) // 2],
        "loss_ar": last["loss_ar"],
        "loss_diffusion": last["loss_diffusion"],
        "data_digest": last["data_digest"],
    }


def summary(scored: dict[str, Any]) -> str:
    """The headline in a few lines."""
    bits = {name: likelihood["bits_per_byte"] for name, likelihood in scored["likelihood"].items()}
    quality = (
        f"held-out bits per byte: TiDAR {bits['tidar']:.4f}, AR twin {bits['twin']:.4f}, "
        f"ratio {scored['bits_per_byte_over_twin']:.4f}"
    )
    speeds = [
        f"{row['method']}, temperature {row['temperature']:g}: "
        f"{row['tokens_per_forward']:.2f} tokens per forward, {row['speedup_over_ar']:.2f} "
        f"times AR, distinct 4-grams {row['distinct_4grams']:.2f}"
        for row in scored["decode_speed"]
        if row["method"] != "ar"
    ]
    return "\n".join([quality, *speeds])


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_result", description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    device, scored = torch.device(given.device), collect(given.work)
    path = write("gpu_train", device, given.results, "bash bench/gpu_train.sh", **scored)
    print(f"{summary(scored)}\n{path}")


if __name__ == "__main__":
    main(sys.argv[1:])
