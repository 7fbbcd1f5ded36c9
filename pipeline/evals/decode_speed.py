"""The decode-speed eval: AR and TiDAR side by side on the same held-out prompts.

A young model flatters itself twice. It repeats itself, and repetition is easy to draft: so the
share of distinct 4-grams stands beside tokens per forward. And it is close to unigram, where draft
and verifier agree because both are flat: so what a context-free draft would get stands beside
every acceptance, and the AR loss with them.
"""

import json
import statistics
from functools import reduce
from operator import add
from pathlib import Path

from data_prep.tokenizers.load import Tokenizer
from pipeline.decoding import generate
from pipeline.decoding.methods import LOOKUP_TOKENS
from pipeline.decoding.text import token_texts
from pipeline.distributed import World
from pipeline.evals.config import Check, DecodeSpeedConfig, never
from pipeline.evals.decoders import COMPARED, Decoder
from pipeline.evals.decoding_runs import Key, Measured, by_category, measure
from pipeline.evals.heldout import HeldOut
from pipeline.evals.heldout_scores import (
    describe_staleness,
    describe_text,
    score_by_staleness,
    score_heldout,
)
from pipeline.model.loading import load_draft_model
from pipeline.model.transformer import Transformer
from tidar_common.files import write_text_atomic
from tidar_common.run_files import EvalRow, HeldOutRow

WHOLE = ""
"""Beside the names of sources, all of the held-out text."""


def evaluate_decode_speed(
    model: Transformer,
    heldout: HeldOut,
    config: DecodeSpeedConfig,
    world: World,
    step: int | None,
    check: Check = never,
) -> list[EvalRow]:
    """One row for each decoder and temperature, equal on all ranks; keys as in `docs/evals.md`.

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
    decoders = decoders_for(model, config)
    measured = measure(
        model, prompts, categories, decoders, config, block_size, world,
        draft_model_of(model, heldout, config), check,
    )  # fmt: skip
    parts = {WHOLE: heldout, **heldout.by_source()}
    scores = {
        name: score_heldout(model, part, config, world, check) for name, part in parts.items()
    }
    entropies = {name: part.unigram().entropy for name, part in parts.items()}
    stale = score_by_staleness(model, heldout, config, world, scores[WHOLE], check)
    rows = []
    for temperature in config.temperatures:
        texts = {
            name: describe_text(score, temperature, drafts, entropies[name])
            for name, score in scores.items()
        }
        whole = texts.pop(WHOLE)
        by_source = texts or None
        staleness = describe_staleness(stale, temperature)
        rows += [
            _row(step, decoder, temperature, measured, whole, by_source, staleness)
            for decoder in decoders
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


def decoders_for(model: Transformer, config: DecodeSpeedConfig) -> list[Decoder]:
    """AR first, then the others asked for that the model can do."""
    names = ["ar", *(name for name in config.methods if name != "ar")]
    return [COMPARED[name] for name in names if COMPARED[name].fits(model)]


def _row(
    step: int | None,
    decoder: Decoder,
    temperature: float,
    measured: dict[Key, Measured],
    text: HeldOutRow,
    by_source: dict[str, HeldOutRow] | None,
    staleness: dict[str, float | None] | None,
) -> EvalRow:
    """What was measured while decoding, and on held-out text beside it."""
    greedy, key = temperature == 0, (decoder.name, temperature)
    run, ar = measured[key], measured["ar", temperature]
    totals, shape = run.totals, run.shape
    size = LOOKUP_TOKENS + 1 if decoder.traits.proposes else max(shape.block_size, 1)
    blocks = list(shape.blocks) if shape.drafting and decoder.traits.verifies else None
    ratios = [a / b for a, b in zip(run.speeds(), ar.speeds(), strict=True)]
    speedup = statistics.median(run.speeds()) / statistics.median(ar.speeds())
    return EvalRow(
        step=step,
        method=decoder.name,
        temperature=temperature,
        block_size=size,
        blocks=blocks,
        prompts=totals.answers,
        tokens=totals.tokens,
        forwards=totals.forwards,
        tokens_per_forward=totals.tokens_per_forward,
        tokens_per_decoding_forward=totals.tokens_per_decoding_forward,
        queries_per_forward=shape.num_queries if shape.drafting else size,
        seconds_per_decoding_forward=run.step_seconds(),
        seconds_by_queries=reduce(add, run.repeats).seconds_by_queries(),
        repeats=len(run.repeats),
        tokens_per_second=statistics.median(run.speeds()),
        tokens_per_second_range={"min": min(run.speeds()), "max": max(run.speeds())},
        speedup_over_ar=speedup,
        speedup_over_ar_range={"min": min(ratios), "max": max(ratios)},
        conversion=speedup / totals.tokens_per_forward,
        exact_match_ar=totals.matches / totals.answers if greedy else None,
        divergences=len(run.gaps) if greedy else None,
        largest_divergence_gap=max(run.gaps, default=0.0) if greedy else None,
        acceptance_by_position=totals.acceptance(size) if totals.reached else None,
        distinct_4grams=totals.distinct_4grams,
        peak_memory_bytes=run.peak_bytes,
        categories=by_category(measured, key),
        **text,
        expected_tokens_by_staleness=staleness,
        by_source=by_source,
    )


def write_example(
    model: Transformer,
    tokenizer: Tokenizer,
    heldout: HeldOut,
    config: DecodeSpeedConfig,
    step: int,
    path: Path,
) -> None:
    """Continue one held-out prompt with TiDAR and write it to `path` (JSON).

    At the eval's highest temperature: greedy text of a base model soon repeats itself, and shows
    little. It runs twice as far as the eval's own generations, or to the model's last position.
    """
    temperature = max(config.temperatures)
    prompt = heldout.prompts(1, config.prompt_tokens, config.seed)[0]
    room = model.config.max_positions - len(prompt)
    result = generate(
        model,
        prompt,
        block_size=config.block_size,
        temperature=temperature,
        seed=config.seed,
        max_new_tokens=min(2 * config.max_new_tokens, room),
    )
    content = {
        "step": step,
        "prompt": tokenizer.decode(prompt),
        "method": "tidar",
        "temperature": temperature,
        "block_size": config.block_size or model.config.block_size,
        "tokens_per_forward": result.tokens_per_forward,
        "tokens": [
            {"text": text, "forward": forward}
            for text, forward in zip(
                token_texts(tokenizer, result.tokens), result.forward_of_token, strict=True
            )
        ],
    }
    write_text_atomic(path, json.dumps(content, ensure_ascii=False))
