"""Steps and eval rows as trackers get them."""

from collections.abc import Iterator

from pipeline.training.moments import StepMetrics

BY_SOURCE = {
    source: {
        "ar_loss": loss, "diffusion_loss": loss + 1, "teacher_forced_acceptance": [0.5, 0.25],
        "teacher_forced_survival": [0.5, 0.125], "expected_tokens_per_forward": 1.625,
        "unigram_expected_tokens_per_forward": 1.25, "bigram_expected_tokens_per_forward": 1.5,
        "recurrent_expected_tokens_per_forward": 1.75,
        "draft_calibration": {"drafts": [3, 4]},
        "draft_calibration_error": 0.0625,
    }
    for source, loss in (("code", 2.5), ("web", 4.0))
}  # fmt: skip
EVAL_ROWS = [
    {
        "step": 0, "method": method, "temperature": temperature, "block_size": 3, "prompts": 2,
        "tokens": 20, "forwards": 10, "tokens_per_forward": 2.0, "tokens_per_second": 31.5,
        "conversion": 0.6, "queries_per_forward": 20, "seconds_per_decoding_forward": 0.03,
        "divergences": None, "largest_divergence_gap": None, "peak_memory_bytes": None,
        "speedup_over_ar": 0.75, "exact_match_ar": 1.0 if temperature == 0 else None,
        "acceptance_by_position": [0.625, None] if method == "tidar" else None,
        "distinct_4grams": 0.5, "ar_loss": 3.25, "diffusion_loss": 4.5, "unigram_loss": 6.0,
        "unigram_entropy": 5.75, "teacher_forced_acceptance": None, "unigram_acceptance": None,
        "bigram_acceptance": None, "by_source": BY_SOURCE, "expected_tokens_per_forward": 2.25,
        "bigram_expected_tokens_per_forward": 1.5,
    }
    for method in ("ar", "tidar")
    for temperature in (0.0, 1.0)
]  # fmt: skip


def steps(first: int, last: int) -> Iterator[StepMetrics]:
    """Metrics of steps `first … last`, each a function of its number."""
    for step in range(first, last + 1):
        yield StepMetrics(
            step=step,
            loss=4.0 / step,
            loss_ar=3.0 / step,
            loss_diffusion=5.0 / step if step % 2 else None,
            loss_alone=6.0 / step if step % 2 else None,
            learning_rate=1e-3 * step,
            grad_norm=0.1 * step,
            tokens=100 * step,
            tokens_per_second=50.0,
            sequences_seen=4 * step,
            data_digest=f"{step:064x}",
            step_seconds=2.0,
            data_wait_seconds=0.01,
            model_tflops=0.25,
            mfu=0.5 if step % 2 else None,
            peak_memory_bytes=2**30 + step,
            mask_embedding_norm=0.75 + step if step % 2 else None,
        )
