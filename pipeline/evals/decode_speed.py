"""The decode-speed eval: AR and TiDAR side by side on the same held-out prompts.

A young model flatters itself twice. It repeats itself, and repetition is easy to draft: so the
share of distinct 4-grams stands beside tokens per forward. And it is close to unigram, where draft
and verifier agree because both are flat: so what a context-free draft would get stands beside
every acceptance, and the AR loss with them.
"""

import statistics
from functools import reduce
from operator import add
from typing import Any

from pipeline.decoding.methods import LOOKUP_TOKENS, PROPOSED
from pipeline.decoding.settings import load_draft_model
from pipeline.distributed import World
from pipeline.evals.decoding_runs import Key, Measured, by_category, measure
from pipeline.evals.drafting import (
    describe_staleness,
    describe_text,
    score_by_staleness,
    score_heldout,
)
from pipeline.evals.heldout import HeldOut
from pipeline.evals.interruption import Check, never
from pipeline.evals.settings import DecodeSpeedConfig
from pipeline.model.transformer import Transformer

NEED_A_MASK = ("tidar", "tidar_chosen", "block_diffusion")


def evaluate_decode_speed(
    model: Transformer,
    heldout: HeldOut,
    config: DecodeSpeedConfig,
    world: World,
    step: int | None,
    check: Check = never,
) -> list[dict[str, Any]]:
    """One row for each (method, temperature), equal on all ranks; keys as in `docs/evals.md`.

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
    sources = heldout.by_source()
    entropies = {name: one.unigram().entropy for name, one in sources.items()}
    entropy = heldout.unigram().entropy
    scores = score_heldout(model, heldout, config, world, check)
    by_source = {
        name: score_heldout(model, one, config, world, check) for name, one in sources.items()
    }
    stale = score_by_staleness(model, heldout, config, world, scores, check)
    rows = []
    for temperature in config.temperatures:
        quality = describe_text(scores, temperature, drafts, entropy)
        quality["expected_tokens_by_staleness"] = describe_staleness(stale, temperature)
        quality["by_source"] = {
            name: describe_text(own, temperature, drafts, entropies[name])
            for name, own in by_source.items()
        } or None
        rows += [
            {"step": step, **_decoding_part(method, temperature, measured), **quality}
            for method in methods
        ]
    return rows


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
        if (model.config.mask_token_id is not None or name not in NEED_A_MASK)
        and (model.draft_head is not None or name != "recurrent")
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
