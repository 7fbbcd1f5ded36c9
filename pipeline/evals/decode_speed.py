"""The decode-speed eval: AR and TiDAR side by side on the same held-out prompts.

A young model flatters itself twice. It repeats itself, and repetition is easy to draft: so the
share of distinct 4-grams stands beside tokens per forward. And it is close to unigram, where draft
and verifier agree because both are flat: so what a context-free draft would get stands beside
every acceptance, and the AR loss with them.
"""

import statistics
from collections.abc import Iterator
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

from pipeline.data.source import Sequence
from pipeline.decoding.methods import LOOKUP_TOKENS, PROPOSED
from pipeline.decoding.settings import load_draft_model
from pipeline.distributed import World
from pipeline.evals.decoding_runs import Key, Measured, by_category, measure
from pipeline.evals.heldout import HeldOut
from pipeline.evals.interruption import Check, never
from pipeline.evals.settings import DecodeSpeedConfig
from pipeline.model.transformer import Transformer
from pipeline.objective.acceptance import DraftScores, score_drafts
from pipeline.objective.calibration import describe

NEED_A_MASK = ("tidar", "tidar_chosen", "block_diffusion")


def evaluate_decode_speed(
    model: Transformer,
    heldout: HeldOut,
    config: DecodeSpeedConfig,
    world: World,
    step: int | None,
    check: Check = never,
) -> list[dict[str, Any]]:
    """One row for each (method, temperature), equal on all ranks; keys as in `docs/metrics.md`.

    Every rank must call it with the same full weights; each takes its share of prompts and
    sequences. But for clock times the rows do not depend on the number of ranks.

    Args:
        model: in evaluation mode. Without a mask token only AR rows come out.
        heldout: where prompts and sequences come from.
        config: how many of them, and how they are decoded.
        world: the ranks that share the work.
        step: optimizer step, copied into the rows; None where it is not known.
        check: called between generations and sequences, equally often on all ranks; what it raises
            ends the eval there.

    Raises:
        UserError: when no held-out document is long enough, or a prompt and its continuation do
            not fit the model's positions.
    """
    drafts = model.config.mask_token_id is not None
    block_size = (config.block_size or model.config.block_size or 1) if drafts else 1
    prompts, categories = heldout.prompts_for(config)
    methods = methods_of(model, config)
    measured = measure(
        model, prompts, categories, methods, config, block_size, world,
        draft_model_of(model, heldout, config), check,
    )  # fmt: skip
    unigram = heldout.unigram()
    scores = score_heldout(model, heldout, config, world, check)
    rows = []
    for temperature in config.temperatures:
        for method in methods:
            row = _decoding_part(method, temperature, measured)
            quality = _scoring_part(scores, temperature, drafts, unigram.entropy)
            rows.append({"step": step, **row, **quality})
    return rows


def score_heldout(
    model: Transformer,
    heldout: HeldOut,
    config: DecodeSpeedConfig,
    world: World,
    check: Check = never,
) -> DraftScores:
    """Losses and acceptance on the held-out sequences of `config`; sums over all ranks, which must
    call it together with the same weights. `check` as in `evaluate_decode_speed`."""
    drafts = model.config.mask_token_id is not None
    block_size = (config.block_size or model.config.block_size or 1) if drafts else 1
    sequences = heldout.sequences(
        config.score_sequences,
        config.seed,
        block_size,
        shift=True,  # the decoder, too, starts its blocks anywhere
        rank=world.rank,
        world_size=world.size,
    )
    probabilities = torch.from_numpy(heldout.unigram().probabilities).float()
    total = min(config.score_sequences, heldout.manifest.heldout.sequences)
    checked = _checked(sequences, -(-total // world.size), check)
    own = score_drafts(model, checked, block_size, probabilities)
    return reduce(add, world.gather(own))


def _checked(sequences: Iterator[Sequence], rounds: int, check: Check) -> Iterator[Sequence]:
    """`sequences`, of which a rank may have one less than there are rounds of all ranks."""
    for _ in range(rounds):
        check()
        sequence = next(sequences, None)
        if sequence is not None:
            yield sequence


def draft_model_of(
    model: Transformer, heldout: HeldOut, config: DecodeSpeedConfig
) -> Transformer | None:
    """The model that drafts for `speculative`, in the type and on the device of `model`.

    Raises:
        UserError: when it has another tokenizer.
    """
    if config.draft_checkpoint is None:
        return None
    first = next(model.parameters())
    key = "evals.decode_speed.draft_checkpoint"
    return load_draft_model(
        config.draft_checkpoint, heldout.tokenizer, key, dtype=first.dtype, device=first.device
    )


def methods_of(model: Transformer, config: DecodeSpeedConfig) -> tuple[str, ...]:
    """AR first, then the others asked for that the model can do."""
    able = [
        name
        for name in config.methods
        if model.config.mask_token_id is not None or name not in NEED_A_MASK
    ]
    return ("ar", *(name for name in able if name != "ar"))


def _decoding_part(
    method: str, temperature: float, measured: dict[Key, Measured]
) -> dict[str, Any]:
    """What was measured while decoding."""
    greedy = temperature == 0
    own, ar = measured[method, temperature], measured["ar", temperature]
    totals = own.totals
    shape = own.shape
    size = LOOKUP_TOKENS + 1 if method in PROPOSED else max(shape.block_size, 1)
    ratios = [a / b for a, b in zip(own.speeds(), ar.speeds(), strict=True)]
    speedup = statistics.median(own.speeds()) / statistics.median(ar.speeds())
    return {
        "method": method,
        "temperature": temperature,
        "block_size": size,
        "blocks": list(shape.blocks) if shape.drafting and method != "block_diffusion" else None,
        "prompts": totals.prompts,
        "tokens": totals.tokens,
        "forwards": totals.forwards,
        "tokens_per_forward": totals.tokens_per_forward,
        "tokens_per_decoding_forward": totals.tokens_per_decoding_forward,
        "queries_per_forward": shape.num_queries if shape.drafting else size,
        "seconds_per_decoding_forward": own.step_seconds(),
        "seconds_by_queries": reduce(add, own.repeats).seconds_by_queries(),
        "repeats": len(own.repeats),
        "tokens_per_second": statistics.median(own.speeds()),
        "tokens_per_second_range": {"min": min(own.speeds()), "max": max(own.speeds())},
        "speedup_over_ar": speedup,
        "speedup_over_ar_range": {"min": min(ratios), "max": max(ratios)},
        "conversion": speedup / totals.tokens_per_forward,
        "exact_match_ar": totals.matches / totals.prompts if greedy else None,
        "divergences": len(own.gaps) if greedy else None,
        "largest_divergence_gap": max(own.gaps, default=0.0) if greedy else None,
        "acceptance_by_position": totals.acceptance(size) if totals.reached else None,
        "distinct_4grams": totals.distinct_4grams,
        "peak_memory_bytes": own.peak_bytes,
        "categories": by_category(measured, (method, temperature)),
    }


def _scoring_part(
    scores: DraftScores, temperature: float, drafts: bool, unigram_entropy: float
) -> dict[str, Any]:
    """What was measured on held-out text; the same for every method."""
    row = 0 if temperature == 0 else 1
    # Sampling is scored at temperature 1 only; at others the sum of minima differs.
    scored = drafts and temperature in (0, 1)
    survival = _shares(scores.survived[row], scores.drafts)
    unigram_survival = _shares(scores.unigram_survived[row], scores.drafts)
    return {
        "ar_loss": scores.ar_loss / max(scores.ar_tokens, 1),
        "diffusion_loss": scores.diffusion_loss / scores.diffusion_tokens
        if scores.diffusion_tokens
        else None,
        "unigram_loss": scores.unigram_loss / max(scores.ar_tokens, 1),
        "unigram_entropy": unigram_entropy,
        "teacher_forced_acceptance": _shares(scores.accepted[row], scores.drafts)
        if scored
        else None,
        "teacher_forced_survival": survival if scored else None,
        "expected_tokens_per_forward": 1 + sum(share or 0.0 for share in survival)
        if scored
        else None,
        "unigram_acceptance": _shares(scores.unigram_accepted[row], scores.drafts)
        if scored
        else None,
        "unigram_expected_tokens_per_forward": 1 + sum(share or 0.0 for share in unigram_survival)
        if scored
        else None,
        **describe(scores.calibration),
    }


def _shares(sums: Tensor, counts: Tensor) -> list[float | None]:
    pairs = zip(sums.tolist(), counts.tolist(), strict=True)
    return [total / count if count else None for total, count in pairs]
