"""The decode-speed eval: AR and TiDAR side by side on the same held-out prompts.

A young model flatters itself twice. It repeats itself, and repetition is easy to draft: so the
share of distinct 4-grams stands beside tokens per forward. And it is close to unigram, where draft
and verifier agree because both are flat: so what a context-free draft would get stands beside
every acceptance, and the AR loss with them.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from pipeline.decoding import Generation, generate
from pipeline.evals.heldout import HeldOut
from pipeline.evals.settings import DecodeSpeedConfig
from pipeline.model.transformer import Transformer
from pipeline.objective.acceptance import DraftScores, score_drafts
from pipeline.training.distributed import World


@dataclass
class MethodTotals:
    """Sums over the prompts of one (method, temperature)."""

    prompts: int = 0
    tokens: int = 0
    forwards: int = 0
    seconds: float = 0.0
    matches: int = 0
    """Prompts whose tokens equal those of AR decoding."""
    fourgrams: int = 0
    distinct_fourgrams: int = 0
    reached: list[int] = field(default_factory=list)
    """Steps that came to verify draft position 1 … K - 1."""
    accepted: list[int] = field(default_factory=list)
    """Steps that accepted it."""

    def add(self, run: Generation, block_size: int, matches: bool) -> None:
        grams = [tuple(run.tokens[i : i + 4]) for i in range(len(run.tokens) - 3)]
        self.prompts += 1
        self.tokens += len(run.tokens)
        self.forwards += run.forwards
        self.seconds += run.seconds
        self.matches += matches
        self.fourgrams += len(grams)
        self.distinct_fourgrams += len(set(grams))
        positions = range(1, block_size)
        self.reached = _add(self.reached, [sum(a >= i for a in run.accepted) for i in positions])
        self.accepted = _add(self.accepted, [sum(a > i for a in run.accepted) for i in positions])

    def __add__(self, other: "MethodTotals") -> "MethodTotals":
        mine, theirs = asdict(self), asdict(other)
        total: dict[str, Any] = {
            name: _add(value, theirs[name]) if isinstance(value, list) else value + theirs[name]
            for name, value in mine.items()
        }
        return MethodTotals(**total)


def evaluate_decode_speed(
    model: Transformer, heldout: HeldOut, config: DecodeSpeedConfig, world: World, step: int
) -> list[dict[str, Any]]:
    """One row for each (method, temperature), equal on all ranks; keys as in `docs/metrics.md`.

    Every rank must call it with the same full weights; each takes its share of prompts and
    sequences.

    Args:
        model: in evaluation mode. Without a mask token only AR rows come out.
        heldout: where prompts and sequences come from.
        config: how many of them, and how they are decoded.
        world: the ranks that share the work.
        step: optimizer step, copied into the rows.
    """
    drafts = model.config.mask_token_id is not None
    block_size = config.block_size or model.config.block_size or 1
    prompts = heldout.prompts(config.prompts, config.prompt_tokens, config.seed)
    totals = _decode(model, prompts[world.rank :: world.size], config, block_size, drafts)
    combined = _sum_over_ranks(totals, world)
    quality = _score(model, heldout, config, block_size, drafts, world)
    rows = []
    for temperature in config.temperatures:
        speed_ar = None
        for method in ("ar", "tidar") if drafts else ("ar",):
            total = combined[method, temperature]
            speed = total.tokens / total.seconds
            speed_ar = speed_ar or speed
            row = {
                "step": step,
                "method": method,
                "temperature": temperature,
                "block_size": block_size if method == "tidar" else 1,
                "prompts": total.prompts,
                "tokens": total.tokens,
                "forwards": total.forwards,
                "tokens_per_forward": total.tokens / total.forwards,
                "tokens_per_second": speed,
                "speedup_over_ar": speed / speed_ar,
                "exact_match_ar": total.matches / total.prompts if temperature == 0 else None,
                "acceptance_by_position": _rates(total) if method == "tidar" else None,
                "distinct_4grams": total.distinct_fourgrams / max(total.fourgrams, 1),
            }
            rows.append({**row, **quality(temperature)})
    return rows


def _decode(
    model: Transformer,
    prompts: list[list[int]],
    config: DecodeSpeedConfig,
    block_size: int,
    drafts: bool,
) -> dict[tuple[str, float], MethodTotals]:
    methods = ("ar", "tidar") if drafts else ("ar",)
    totals = {(m, t): MethodTotals() for t in config.temperatures for m in methods}
    if prompts:  # first calls allocate and pick kernels; they are not timed
        for method in methods:
            generate(model, prompts[0], method=method, block_size=block_size, max_new_tokens=8)
    for number, prompt in enumerate(prompts):
        for temperature in config.temperatures:
            runs = {
                method: generate(
                    model,
                    prompt,
                    method=method,
                    block_size=block_size,
                    max_new_tokens=config.max_new_tokens,
                    temperature=temperature,
                    seed=config.seed + number,
                    eos_id=None,
                )
                for method in methods
            }
            for method, run in runs.items():
                matches = run.tokens == runs["ar"].tokens
                totals[method, temperature].add(run, block_size, matches)
    return totals


def _sum_over_ranks(
    totals: dict[tuple[str, float], MethodTotals], world: World
) -> dict[tuple[str, float], MethodTotals]:
    parts = world.gather(totals)
    return {key: sum((part[key] for part in parts), MethodTotals()) for key in totals}


def _score(
    model: Transformer,
    heldout: HeldOut,
    config: DecodeSpeedConfig,
    block_size: int,
    drafts: bool,
    world: World,
) -> Any:
    """A function from temperature to the teacher-forced part of a row."""
    sequences = heldout.sequences(config.score_sequences, config.seed, block_size)
    unigram = heldout.unigram()
    probabilities = torch.from_numpy(unigram.probabilities).float()
    mine = score_drafts(
        model, sequences[world.rank :: world.size], block_size if drafts else 1, probabilities
    )
    scores = _merge(world.gather(mine))
    shared = {
        "ar_loss": scores.ar_loss / max(scores.ar_tokens, 1),
        "diffusion_loss": scores.diffusion_loss / scores.diffusion_tokens
        if drafts and scores.diffusion_tokens
        else None,
        "unigram_loss": scores.unigram_loss / max(scores.ar_tokens, 1),
        "unigram_entropy": unigram.entropy,
    }

    def at(temperature: float) -> dict[str, Any]:
        row = 0 if temperature == 0 else 1
        return {
            **shared,
            # Sampling is scored at temperature 1 only; at others the sum of minima differs.
            "teacher_forced_acceptance": _shares(scores.accepted, scores.drafts, row)
            if drafts and temperature in (0, 1)
            else None,
            "unigram_acceptance": _shares(scores.unigram_accepted, scores.drafts, row)
            if drafts and temperature in (0, 1)
            else None,
        }

    return at


def _merge(parts: list[DraftScores]) -> DraftScores:
    total = parts[0]
    for part in parts[1:]:
        for name, value in vars(part).items():
            setattr(total, name, getattr(total, name) + value)
    return total


def _shares(sums: torch.Tensor | None, counts: torch.Tensor | None, row: int) -> list[float | None]:
    assert sums is not None
    assert counts is not None
    return [float(s / c) if c else None for s, c in zip(sums[row], counts, strict=True)]


def _rates(total: MethodTotals) -> list[float | None]:
    pairs = zip(total.accepted, total.reached, strict=True)
    return [accepted / reached if reached else None for accepted, reached in pairs]


def _add(left: list[int], right: list[int]) -> list[int]:
    if not left or not right:
        return left or right
    return [a + b for a, b in zip(left, right, strict=True)]
