"""What a run directory holds and what its processes end with: the contract of those who write it
(training) and those who only read it (status, report, Slurm's scripts). Nothing here needs torch.
"""

from enum import IntEnum
from pathlib import Path
from typing import TypedDict

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
STARTS = "starts.jsonl"
"""Written by slurm/restart.py: a line for each start of a job, and one for its end."""
SKIPPED_SHARDS = "skipped_shards.jsonl"
"""Damaged shards that the run went on without, a line each."""
DECODE_SPEED = "evals/decode_speed.jsonl"
EXAMPLE = "evals/example.json"
ENVIRONMENT = "environment.json"
"""Of the newest start: commit, versions, hardware, command."""
DEEPSPEED_LOG = "deepspeed.log"
REPORT = "report.html"
CONFIG = "config.yaml"
INTERRUPTED = "interrupted"
"""Says: stopped by a signal, saved, to be continued."""
METHOD_LABELS = {
    "ar": "AR",
    "tidar": "TiDAR",
    "tidar_chosen": "TiDAR, chosen step",
    "recurrent": "draft head alone",
    "block_diffusion": "block diffusion (not lossless)",
    "prompt_lookup": "prompt lookup",
    "speculative": "speculative",
}
"""What readers are shown for the `method` of a row of `DECODE_SPEED`."""


class Exit(IntEnum):
    """Exit codes of every command."""

    DONE = 0
    FAULT = 1
    """Of this project, with a traceback; of `tidar-status --compare`, that the runs differ."""
    BAD_INPUT = 2
    """A mistake in config or input: one line on stderr that names the remedy."""
    STOPPED = 3
    """Training stopped for a numerical reason; it would only recur."""
    LOST = 4
    """A process of the run is gone or stuck."""
    SAVED = 75
    """Asked to stop, and saved: the same command goes on (EX_TEMPFAIL of sysexits.h)."""
    INTERRUPTED = 130
    """By Ctrl-C, as shells say it."""
    CLOSED_PIPE = 141
    """The reader of the output went away, as `head` does."""


FINAL = {
    Exit.DONE: "done",
    Exit.BAD_INPUT: "bad config or input",
    Exit.STOPPED: "stopped for a numerical reason",
}
"""After these a job is over, and why; after any other code it is worth another start."""


class Range(TypedDict):
    """Over repeats."""

    min: float
    max: float


class CategoryRow(TypedDict):
    """Of one category of prompts."""

    prompts: int
    tokens_per_forward: float
    speedup_over_ar: float


class DraftScoresRow(TypedDict):
    """How drafts do on held-out text, position by position; None where that is not scored."""

    teacher_forced_acceptance: list[float | None] | None
    teacher_forced_survival: list[float | None] | None
    expected_tokens_per_forward: float | None
    recurrent_acceptance: list[float | None] | None
    recurrent_expected_tokens_per_forward: float | None
    unigram_acceptance: list[float | None] | None
    unigram_expected_tokens_per_forward: float | None
    bigram_acceptance: list[float | None] | None
    bigram_expected_tokens_per_forward: float | None


class CalibrationRow(TypedDict):
    """The model's drafts by confidence."""

    draft_calibration: dict[str, list[float | None]] | None
    draft_calibration_error: float | None


class HeldOutRow(DraftScoresRow, CalibrationRow):
    """What was measured on held-out text."""

    ar_loss: float
    diffusion_loss: float | None
    unigram_loss: float
    unigram_entropy: float


class EvalRow(HeldOutRow):
    """A line of `evals/decode_speed.jsonl`: one method at one temperature of one eval."""

    step: int | None
    method: str
    temperature: float
    block_size: int
    blocks: list[int] | None
    prompts: int
    tokens: int
    forwards: int
    tokens_per_forward: float
    tokens_per_decoding_forward: float | None
    queries_per_forward: int
    seconds_per_decoding_forward: float | None
    seconds_by_queries: dict[str, float] | None
    repeats: int
    tokens_per_second: float
    tokens_per_second_range: Range
    speedup_over_ar: float
    speedup_over_ar_range: Range
    conversion: float
    exact_match_ar: float | None
    divergences: int | None
    largest_divergence_gap: float | None
    acceptance_by_position: list[float | None] | None
    distinct_4grams: float | None
    peak_memory_bytes: int | None
    categories: dict[str, CategoryRow] | None
    expected_tokens_by_staleness: dict[str, float | None] | None
    by_source: dict[str, HeldOutRow] | None


def newest_checkpoint(run_dir: Path) -> str | None:
    """Name of the checkpoint that a run would go on from, under `run_dir/checkpoints`: the one that
    the file `latest` names, or the last of the folders, which appear by a rename; None without."""
    folder = run_dir / "checkpoints"
    names = sorted(path.name for path in folder.glob("step-*") if path.is_dir())
    try:
        latest = (folder / "latest").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        latest = ""
    return latest if latest in names else next(reversed(names), None)
