"""Prompts through every decoder in turns, and the sums and times that come out."""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import product
from operator import add

import torch

from pipeline.decoding import Generation, Sampling
from pipeline.decoding.choice import Acceptance, Conditions, choose
from pipeline.decoding.generate import open_engine, run_engine
from pipeline.decoding.latency import latency_curve
from pipeline.decoding.methods import step_shape
from pipeline.decoding.step import StepShape
from pipeline.distributed import World
from pipeline.evals.divergence import divergence_gap
from pipeline.evals.interruption import Check, never
from pipeline.evals.settings import DecodeSpeedConfig
from pipeline.evals.totals import MethodTotals
from pipeline.model.transformer import Transformer

WARM_UP_TOKENS = 8
CHOICE_PROMPTS = 4
"""Prompts on which acceptance is measured before a step is chosen."""

Key = tuple[str, float]
"""Method and temperature."""


@dataclass
class Measured:
    """One method at one temperature, over all prompts."""

    repeats: list[MethodTotals]
    """The sums of each repeat: equal but for the seconds."""
    gaps: list[float] = field(default_factory=list)
    """Logit gap at each prompt's first difference from greedy AR."""
    categories: dict[str, MethodTotals] = field(default_factory=dict)
    """The first repeat by category of prompt."""
    peak_bytes: int | None = None
    """Most memory held on the GPU, of the ranks; None on a CPU."""
    shape: StepShape = StepShape(1)  # noqa: RUF009  (frozen)
    """The step it decoded with."""

    @property
    def totals(self) -> MethodTotals:
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
        empty = MethodTotals()
        return Measured(
            [a + b for a, b in zip(self.repeats, other.repeats, strict=True)],
            self.gaps + other.gaps,
            {
                name: self.categories.get(name, empty) + other.categories.get(name, empty)
                for name in names
            },
            max(peaks) if peaks else None,
            self.shape,
        )


def measure(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    categories: Sequence[str | None],
    methods: Sequence[str],
    config: DecodeSpeedConfig,
    block_size: int,
    world: World,
    draft_model: Transformer | None = None,
    check: Check = never,
) -> dict[Key, Measured]:
    """Decode this rank's prompts by every method at every temperature; sums over all ranks.

    Methods take turns at going first, prompt by prompt, and repeats go round all prompts, so that
    a slow spell of the machine meets all alike. First calls are not timed. `check` is called
    before each generation, also by a rank that has no prompt left in the last round.
    """
    check()
    own = range(world.rank, len(prompts), world.size)
    keys = [(method, t) for t in config.temperatures for method in methods]
    shapes = choose_shapes(model, prompts, methods, config, block_size, world)
    found = {
        key: Measured([MethodTotals() for _ in range(config.repeats)], shape=shapes[key])
        for key in keys
    }
    decoders: dict[Key, Decoder] = {}
    if own:
        decoders = {
            key: Decoder(model, key, [prompts[n] for n in own], config, shapes[key], draft_model)
            for key in keys
        }
    for key in keys:
        check()
        if own:
            decoders[key].run(0, own[0], min(WARM_UP_TOKENS, config.max_new_tokens))
    rounds = -(-len(prompts) // world.size)
    for repeat, turn in product(range(config.repeats), range(rounds)):
        order = methods if turn % 2 == 0 else methods[::-1]
        for temperature in config.temperatures:
            runs = {}
            for method in order:
                check()
                if turn < len(own):
                    runs[method] = decoders[method, temperature].run(turn, own[turn])
            if runs:
                _add(found, model, runs, temperature, repeat, prompts[own[turn]])
                category = categories[own[turn]]
                if repeat == 0 and category is not None:
                    _add_category(found, runs, temperature, category)
    for key, decoder in decoders.items():
        found[key].peak_bytes = decoder.peak_bytes
    parts = world.gather(found)
    return {key: reduce(add, (part[key] for part in parts)) for key in keys}


def _decoded_by(method: str, shape: StepShape) -> str:
    """The decoder's own name for an eval's method."""
    if method == "tidar_chosen":
        return "tidar" if shape.drafting else "ar"
    return method


def choose_shapes(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    methods: Sequence[str],
    config: DecodeSpeedConfig,
    block_size: int,
    world: World,
) -> dict[Key, StepShape]:
    """The step of each method and temperature; what is chosen, rank 0 chooses for all.

    The acceptance is that of the first prompts, decoded once with every block and not timed.
    """
    shapes: dict[Key, StepShape] = {}
    for temperature in config.temperatures:
        for method in methods:
            shape = StepShape(1)
            if method in ("tidar", "tidar_chosen"):
                blocks = config.blocks if method == "tidar" else None
                shape = step_shape(model, "tidar", Sampling(), block_size, blocks)
            elif method in ("recurrent", "block_diffusion"):
                shape = step_shape(model, method, Sampling(), block_size)
            shapes[method, temperature] = shape
    if "tidar_chosen" in methods:
        chosen: dict[float, StepShape] = {}
        if world.is_main:
            curve = latency_curve(model)
            cached = len(prompts[0]) + config.max_new_tokens // 2
            for temperature in config.temperatures:
                conditions = Conditions(
                    curve, cached, greedy=temperature == 0, linear=model.config.linear_drafts
                )
                sample = prompts[:CHOICE_PROMPTS]
                acceptance = _acceptance(model, sample, temperature, config, block_size)
                chosen[temperature] = choose(acceptance, conditions).shape
        for temperature, shape in world.from_main(chosen).items():
            shapes["tidar_chosen", temperature] = shape
    return shapes


def _acceptance(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    temperature: float,
    config: DecodeSpeedConfig,
    block_size: int,
) -> Acceptance:
    """By position, of drafts with every block and, of a draft head, without any."""

    def rates(method: str, shape: StepShape) -> list[float]:
        decoder, totals = (
            Decoder(model, (method, temperature), prompts, config, shape),
            MethodTotals(),
        )
        for number in range(len(prompts)):
            totals += MethodTotals.of(decoder.run(number, number), matches=False)
        return [rate or 0.0 for rate in totals.acceptance(block_size)]

    block = rates("tidar", step_shape(model, "tidar", Sampling(), block_size))
    if model.draft_head is None:
        return Acceptance(block)
    return Acceptance(
        block, rates("recurrent", step_shape(model, "recurrent", Sampling(), block_size))
    )


def _add(
    found: dict[Key, Measured],
    model: Transformer,
    runs: dict[str, Generation],
    temperature: float,
    repeat: int,
    prompt: Sequence[int],
) -> None:
    for method, run in runs.items():
        measured = found[method, temperature]
        matches = run.tokens == runs["ar"].tokens
        measured.repeats[repeat] += MethodTotals.of(run, matches=matches)
        if repeat == 0 and temperature == 0 and not matches:
            gap = divergence_gap(model, prompt, runs["ar"].tokens, run.tokens)
            if gap is not None:
                measured.gaps.append(gap)


def _add_category(
    found: dict[Key, Measured], runs: dict[str, Generation], temperature: float, category: str
) -> None:
    for method, run in runs.items():
        sums = found[method, temperature].categories
        known = sums.get(category, MethodTotals())
        sums[category] = known + MethodTotals.of(run, matches=run.tokens == runs["ar"].tokens)


class Decoder:
    """One method at one temperature: cache and captured steps are made once for all prompts."""

    def __init__(
        self,
        model: Transformer,
        key: Key,
        prompts: Sequence[Sequence[int]],
        config: DecodeSpeedConfig,
        shape: StepShape,
        draft_model: Transformer | None = None,
    ) -> None:
        """`shape` says how a TiDAR method drafts; one that drafts nothing is plain decoding."""
        self.method, temperature = key
        self.config = config
        method = _decoded_by(self.method, shape)
        self.engine, self.prompts = open_engine(
            model,
            prompts,
            method=method,
            block_size=shape.block_size or None,
            blocks=shape.blocks if shape.drafting else None,
            max_new_tokens=config.max_new_tokens,
            sampling=Sampling(temperature=temperature),
            draft_model=draft_model,
            confidence=config.confidence,
        )
        self.counts_drafts = method not in ("ar", "block_diffusion")
        self.peak_bytes: int | None = None

    def run(self, index: int, number: int, tokens: int | None = None) -> Generation:
        """Continue prompt `index` of this rank, which is `number` of all and seeds by that."""
        device = self.engine.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        (result,) = run_engine(
            self.engine,
            [self.prompts[index]],
            seeds=[self.config.seed + number],
            max_new_tokens=tokens or self.config.max_new_tokens,
            count_accepted=self.counts_drafts,
        )
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
            self.peak_bytes = max(peak, self.peak_bytes or 0)
        return result


def by_category(measured: dict[Key, Measured], key: Key) -> dict[str, dict[str, float]] | None:
    """Tokens per forward and speed over AR of each category of prompts; None without categories."""
    rows: dict[str, dict[str, float]] = defaultdict(dict)
    ar = measured["ar", key[1]].categories
    for name, totals in sorted(measured[key].categories.items()):
        rows[name] = {
            "prompts": totals.prompts,
            "tokens_per_forward": totals.tokens_per_forward,
            "speedup_over_ar": totals.tokens_per_second / ar[name].tokens_per_second,
        }
    return dict(rows) or None
