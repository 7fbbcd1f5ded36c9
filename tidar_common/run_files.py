"""The rows of a run directory's files, by the names of their keys; needs no torch.

What the keys mean, and their units, is in docs/metrics.md.
"""

from typing import TypedDict


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
