"""What is kept of a run: its figures, what it cost, and how to do it again."""

import importlib.metadata
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bench.experiments.runs import Run
from bench.results import machine, revision
from tidar_common.jsonlines import read_whole
from tidar_common.run_files import METRICS

PACKAGES = ("torch", "deepspeed", "numpy", "sentencepiece")


def make_result(
    run: Run,
    seed: int,
    steps: int,
    commands: list[str],
    *,
    flops: int,
    run_dir: Path,
    scores: list[dict[str, Any]],
    text: dict[str, Any],
) -> dict[str, Any]:
    """The content of a result file.

    Args:
        run: what was done.
        seed: of weights, data order and shifts.
        steps: optimizer steps.
        commands: that were run, as a user types them.
        flops: of the training run, by the planner; what it starts from not included.
        run_dir: of the training run.
        scores: outputs of `tidar-evaluate`, one for each block length.
        text: what `bench.experiments.corpus` said of the corpus.
    """
    rows = read_whole(run_dir / METRICS)
    return {
        "run": run.name,
        "about": run.about,
        "question": run.question,
        "seed": seed,
        "start": run.start,
        "steps": steps,
        "clean_tokens": rows[-1]["tokens"],
        "training_flops": flops,
        "training_seconds": sum(row["step_seconds"] for row in rows),
        "data_digest": rows[-1]["data_digest"],
        "scores": [summary(score) for score in scores],
        "corpus": text,
        "commands": commands,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": revision(),
        "machine": machine(torch.device("cpu")),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def summary(score: dict[str, Any]) -> dict[str, Any]:
    """The figures of one `tidar-evaluate`: likelihood, then drafts and decoding by temperature."""
    likelihood = score["likelihood"]
    rows = {(row["method"], row["temperature"]): row for row in score["decode_speed"]}
    tidar = ("tidar", 1.0) in rows
    kept = {
        name: likelihood[name]
        for name in (
            "block_size", "ar_loss", "perplexity", "bits_per_byte", "unigram_loss",
            "unigram_entropy", "diffusion_loss", "diffusion_bits_per_byte", "ar_tokens",
        )
    }  # fmt: skip
    for temperature, name in ((0.0, "greedy"), (1.0, "sampled")):
        row = rows["tidar" if tidar else "ar", temperature]
        kept[name] = {
            key: row[key]
            for key in (
                "expected_tokens_per_forward", "unigram_expected_tokens_per_forward",
                "bigram_expected_tokens_per_forward", "recurrent_expected_tokens_per_forward",
                "teacher_forced_acceptance", "unigram_acceptance", "bigram_acceptance",
                "recurrent_acceptance", "tokens_per_forward",
                "distinct_4grams", "exact_match_ar", "tokens_per_second", "speedup_over_ar",
                "prompts", "tokens",
            )
        }  # fmt: skip
        kept[name]["ar_distinct_4grams"] = rows["ar", temperature]["distinct_4grams"]
    return kept
