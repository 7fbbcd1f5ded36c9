"""The decode-speed eval: AR and TiDAR side by side on the same held-out prompts.

A young model flatters itself twice. It repeats itself, and repetition is easy to draft: so the
share of distinct 4-grams stands beside tokens per forward. And it is close to unigram, where draft
and verifier agree because both are flat: so what a context-free draft would get stands beside
every acceptance, and the AR loss with them.
"""

from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

from pipeline.decoding import Generation, generate
from pipeline.evals.heldout import HeldOut
from pipeline.evals.settings import DecodeSpeedConfig
from pipeline.evals.totals import MethodTotals
from pipeline.model.transformer import Transformer
from pipeline.objective.acceptance import DraftScores, score_drafts
from pipeline.training.distributed import World

WARM_UP_TOKENS = 8


def evaluate_decode_speed(
    model: Transformer, heldout: HeldOut, config: DecodeSpeedConfig, world: World, step: int | None
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

    Raises:
        UserError: when no held-out document is long enough, or a prompt and its continuation do
            not fit the model's positions.
    """
    drafts = model.config.mask_token_id is not None
    block_size = (config.block_size or model.config.block_size or 1) if drafts else 1
    prompts = heldout.prompts(config.prompts, config.prompt_tokens, config.seed)
    totals = _decode(model, prompts, config, block_size, world)
    unigram = heldout.unigram()
    sequences = heldout.sequences(
        config.score_sequences,
        config.seed,
        block_size,
        shift=True,  # the decoder, too, starts its blocks anywhere
        rank=world.rank,
        world_size=world.size,
    )
    probabilities = torch.from_numpy(unigram.probabilities).float()
    own = score_drafts(model, sequences, block_size, probabilities)
    scores = reduce(add, world.gather(own))
    rows = []
    for temperature in config.temperatures:
        for method in methods_of(model):
            own_totals, ar_totals = totals[method, temperature], totals["ar", temperature]
            row = _decoding_part(method, temperature, own_totals, ar_totals, block_size)
            quality = _scoring_part(scores, temperature, drafts, unigram.entropy)
            rows.append({"step": step, **row, **quality})
    return rows


def methods_of(model: Transformer) -> tuple[str, ...]:
    """AR first; TiDAR as well where the model can draft."""
    return ("ar",) if model.config.mask_token_id is None else ("ar", "tidar")


def _decode(
    model: Transformer,
    prompts: list[list[int]],
    config: DecodeSpeedConfig,
    block_size: int,
    world: World,
) -> dict[tuple[str, float], MethodTotals]:
    """Decode this rank's prompts by every method at every temperature; sums over all ranks."""
    methods = methods_of(model)

    def run(method: str, temperature: float, number: int, tokens: int) -> Generation:
        return generate(
            model,
            prompts[number],
            method=method,
            block_size=block_size,
            max_new_tokens=tokens,
            temperature=temperature,
            seed=config.seed + number,
        )

    own = range(world.rank, len(prompts), world.size)
    settings = [(method, t) for t in config.temperatures for method in methods]
    for method, temperature in settings if own else ():
        # First calls allocate and pick kernels; they are not timed.
        run(method, temperature, own[0], min(WARM_UP_TOKENS, config.max_new_tokens))
    totals = {key: MethodTotals() for key in settings}
    for turn, number in enumerate(own):
        # Taking turns at being first, so that neither always finds the caches warm.
        order = methods if turn % 2 == 0 else methods[::-1]
        for temperature in config.temperatures:
            runs = {m: run(m, temperature, number, config.max_new_tokens) for m in order}
            for method in methods:
                matches = runs[method].tokens == runs["ar"].tokens
                totals[method, temperature] += MethodTotals.of(runs[method], matches=matches)
    parts = world.gather(totals)
    return {key: reduce(add, (part[key] for part in parts)) for key in settings}


def _decoding_part(
    method: str, temperature: float, totals: MethodTotals, ar: MethodTotals, block_size: int
) -> dict[str, Any]:
    """What was measured while decoding."""
    greedy, drafts = temperature == 0, method == "tidar"
    return {
        "method": method,
        "temperature": temperature,
        "block_size": block_size if drafts else 1,
        "prompts": totals.prompts,
        "tokens": totals.tokens,
        "forwards": totals.forwards,
        "tokens_per_forward": totals.tokens_per_forward,
        "tokens_per_second": totals.tokens_per_second,
        "speedup_over_ar": totals.tokens_per_second / ar.tokens_per_second,
        "exact_match_ar": totals.matches / totals.prompts if greedy else None,
        "acceptance_by_position": totals.acceptance(block_size) if drafts else None,
        "distinct_4grams": totals.distinct_4grams,
    }


def _scoring_part(
    scores: DraftScores, temperature: float, drafts: bool, unigram_entropy: float
) -> dict[str, Any]:
    """What was measured on held-out text; the same for every method."""
    row = 0 if temperature == 0 else 1
    # Sampling is scored at temperature 1 only; at others the sum of minima differs.
    scored = drafts and temperature in (0, 1)
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
        "unigram_acceptance": _shares(scores.unigram_accepted[row], scores.drafts)
        if scored
        else None,
    }


def _shares(sums: Tensor, counts: Tensor) -> list[float | None]:
    pairs = zip(sums.tolist(), counts.tolist(), strict=True)
    return [total / count if count else None for total, count in pairs]
