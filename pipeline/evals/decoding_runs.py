"""Prompts through every decoder in turns, and the sums and times that come out."""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import product
from operator import add

import torch

from pipeline.decoding import DecodeOptions, Generation, Sampling
from pipeline.decoding.choice import Conditions, choose
from pipeline.decoding.generation import finish_each, open_engine
from pipeline.decoding.latency import latency_curve
from pipeline.decoding.step import StepShape
from pipeline.distributed import World
from pipeline.evals.config import Check, DecodeSpeedConfig, never
from pipeline.evals.decoders import Decoder
from pipeline.evals.totals import Cost
from pipeline.model.draft_record import Acceptance
from pipeline.model.transformer import Transformer
from tidar_common.progress import doing
from tidar_common.run_files import CategoryRow

WARM_UP_TOKENS = 8
CHOICE_PROMPTS = 4
"""Prompts on which acceptance is measured before a step is chosen."""

Key = tuple[str, float]
"""A decoder's name and the temperature."""


@dataclass
class Measured:
    """One decoder at one temperature, over all prompts."""

    shape: StepShape
    """The step it decoded with."""
    greedy: bool
    repeats: list[Cost]
    """The sums of each repeat: equal but for the seconds."""
    gaps: list[float] = field(default_factory=list)
    """Logit gap at each prompt's first difference from greedy AR."""
    categories: dict[str, Cost] = field(default_factory=lambda: defaultdict(Cost))
    """The first repeat by category of prompt."""
    peak_bytes: int | None = None
    """Most memory held on the GPU, of the ranks; None on a CPU."""

    @property
    def totals(self) -> Cost:
        return self.repeats[0]

    def speeds(self) -> list[float]:
        """Tokens per second of each repeat, in order."""
        return [totals.tokens_per_second for totals in self.repeats]

    def step_seconds(self) -> float | None:
        """Median over the repeats of the mean time of a forward after the prompt."""
        times = [totals.seconds_per_decoding_forward for totals in self.repeats]
        known = [time for time in times if time is not None]
        return statistics.median(known) if known else None

    def __add__(self, other: "Measured") -> "Measured":
        peaks = [peak for peak in (self.peak_bytes, other.peak_bytes) if peak is not None]
        names = dict.fromkeys([*self.categories, *other.categories])
        empty = Cost()
        return Measured(
            self.shape,
            self.greedy,
            [a + b for a, b in zip(self.repeats, other.repeats, strict=True)],
            self.gaps + other.gaps,
            {
                name: self.categories.get(name, empty) + other.categories.get(name, empty)
                for name in names
            },
            max(peaks) if peaks else None,
        )


def measure(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    categories: Sequence[str | None],
    decoders: Sequence[Decoder],
    config: DecodeSpeedConfig,
    block_size: int,
    world: World,
    draft_model: Transformer | None = None,
    check: Check = never,
) -> dict[Key, Measured]:
    """Decode this rank's prompts by every decoder at every temperature; sums over all ranks.

    Decoders take turns at going first, prompt by prompt, and repeats go round all prompts, so that
    a slow spell of the machine meets all alike. First calls are not timed. `check` is called
    before each generation, also by a rank that has no prompt left in the last round.
    """
    check()
    numbers = range(world.rank, len(prompts), world.size)
    options = options_of(model, prompts, decoders, config, block_size, world, draft_model)
    results = {
        key: Measured(value.step_shape(model), value.sampling.greedy, [Cost()] * config.repeats)
        for key, value in options.items()
    }
    runners: dict[Key, Runner] = {}
    if numbers:
        share = [prompts[n] for n in numbers]
        runners = {key: Runner(model, share, value) for key, value in options.items()}
    for key in options:
        check()
        if numbers:
            runners[key].run(0, numbers[0], min(WARM_UP_TOKENS, config.max_new_tokens))
    rounds = -(-len(prompts) // world.size)
    names = [decoder.name for decoder in decoders]
    for repeat, turn in product(range(config.repeats), range(rounds)):
        doing.part("answer", repeat * rounds + turn + 1, config.repeats * rounds)
        order = names if turn % 2 == 0 else names[::-1]
        for temperature in config.temperatures:
            runs = {}
            for name in order:
                check()
                if turn < len(numbers):
                    runs[name] = runners[name, temperature].run(turn, numbers[turn])
            if runs:
                number = numbers[turn]
                here = {name: results[name, temperature] for name in names}
                _add(here, model, runs, repeat, prompts[number], categories[number])
    for key, runner in runners.items():
        results[key].peak_bytes = runner.peak_bytes
    parts = world.gather(results)
    return {key: reduce(add, (part[key] for part in parts)) for key in results}


def options_of(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    decoders: Sequence[Decoder],
    config: DecodeSpeedConfig,
    block_size: int,
    world: World,
    draft_model: Transformer | None = None,
) -> dict[Key, DecodeOptions]:
    """How each decoder decodes at each temperature; what is chosen, rank 0 chooses for all.

    Args:
        model: what decodes; its latency curve decides for a decoder that chooses its step.
        prompts: the acceptance is that of the first ones, decoded once with every block and not
            timed.
        decoders: each gives one entry for each temperature.
        config: what they have in common.
        block_size: K of those that draft themselves.
        world: the ranks.
        draft_model: of `speculative`.
    """
    options: dict[Key, DecodeOptions] = {}
    for temperature, decoder in product(config.temperatures, decoders):
        options[decoder.name, temperature] = DecodeOptions(
            method=decoder.method,
            block_size=None if decoder.traits.proposes else block_size,
            blocks=None if decoder.chooses_step else config.blocks,
            sampling=Sampling(temperature=temperature, seed=config.seed),
            max_new_tokens=config.max_new_tokens,
            draft_model=draft_model,
            confidence=config.confidence,
        )
    choosing = [
        (decoder.name, t)
        for t in config.temperatures
        for decoder in decoders
        if decoder.chooses_step
    ]
    shapes: dict[Key, StepShape] = {}
    if choosing and world.is_main:
        shapes = {key: _chosen_shape(model, prompts, options[key]) for key in choosing}
    for key, shape in world.from_main(shapes).items() if choosing else ():
        options[key] = replace(
            options[key],
            method="tidar" if shape.drafting else "ar",
            block_size=shape.block_size or None,
            blocks=shape.blocks,
        )
    return options


def _chosen_shape(
    model: Transformer, prompts: Sequence[Sequence[int]], options: DecodeOptions
) -> StepShape:
    """The step that pays here, at the acceptance of the first prompts."""
    acceptance = _acceptance(model, prompts[:CHOICE_PROMPTS], options)
    conditions = Conditions(
        latency_curve(model),
        len(prompts[0]) + options.max_new_tokens // 2,
        greedy=options.sampling.greedy,
        linear=model.config.linear_drafts,
    )
    return choose(acceptance, conditions).shape


def _acceptance(
    model: Transformer, prompts: Sequence[Sequence[int]], options: DecodeOptions
) -> Acceptance:
    """By position, of drafts with every block and, of a draft head, without any."""

    def rates(method: str) -> list[float]:
        runner, total = Runner(model, prompts, replace(options, method=method)), Cost()
        for number in range(len(prompts)):
            total += Cost.of(runner.run(number, number))
        return [rate or 0.0 for rate in total.acceptance(options.block_size or 1)]

    headed = model.draft_head is not None
    return Acceptance(rates("tidar"), rates("recurrent") if headed else None)


def _add(
    results: dict[str, Measured],
    model: Transformer,
    runs: dict[str, Generation],
    repeat: int,
    prompt: Sequence[int],
    category: str | None,
) -> None:
    """Count what every decoder made of one prompt, at one temperature; `results` by name."""
    ar = runs["ar"].tokens
    for name, run in runs.items():
        measured, matches = results[name], run.tokens == ar
        cost = Cost.of(run, matches=matches)
        measured.repeats[repeat] += cost
        if repeat > 0:
            continue
        if category is not None:
            measured.categories[category] += cost
        if measured.greedy and not matches:
            gap = divergence_gap(model, prompt, ar, run.tokens)
            if gap is not None:
                measured.gaps.append(gap)


class Runner:
    """One decoder at one temperature: cache and captured steps are made once for all prompts."""

    def __init__(
        self, model: Transformer, prompts: Sequence[Sequence[int]], options: DecodeOptions
    ) -> None:
        self.options = options
        self.engine, self.prompts = open_engine(model, prompts, options)
        self.peak_bytes: int | None = None

    def run(self, index: int, number: int, tokens: int | None = None) -> Generation:
        """Continue prompt `index` of this rank, which is `number` of all and seeds by that, by
        `tokens` or as many as the options say."""
        options, device = self.options, self.engine.device
        if tokens is not None:
            options = replace(options, max_new_tokens=tokens)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seeds = [options.sampling.seed + number]
        ((_, result),) = finish_each(self.engine, [self.prompts[index]], options, seeds=seeds)
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
            self.peak_bytes = max(peak, self.peak_bytes or 0)
        return result


@torch.inference_mode()
def divergence_gap(
    model: Transformer, prompt: Sequence[int], ar: Sequence[int], other: Sequence[int]
) -> float | None:
    """The logit of AR's token less that of the other's where the two texts first differ.

    In exact arithmetic greedy TiDAR and greedy AR never part. The two compute the same logits in
    matrices of other shapes, so rounding can turn a near tie, above all in bf16; the gap shows
    whether it was one. From one plain causal forward over the text that they share. None when they
    are equal, or when one is the other's beginning.
    """
    pairs = zip(ar, other, strict=False)
    place = next((n for n, (left, right) in enumerate(pairs) if left != right), None)
    if place is None:
        return None
    text = [*prompt, *ar[:place]]
    device = next(model.parameters()).device
    hidden = model.hidden(torch.tensor([text], device=device))[0, -1]
    logits = model.lm_head.logits_to_choose_by(hidden[None])[0].float()
    return float(logits[ar[place]] - logits[other[place]])


def by_category(measured: dict[Key, Measured], key: Key) -> dict[str, CategoryRow] | None:
    """Tokens per forward and speed over AR of each category of prompts; None without categories."""
    ar = measured["ar", key[1]].categories
    rows = {
        name: CategoryRow(
            prompts=cost.answers,
            tokens_per_forward=cost.tokens_per_forward,
            speedup_over_ar=cost.tokens_per_second / ar[name].tokens_per_second,
        )
        for name, cost in sorted(measured[key].categories.items())
    }
    return rows or None
