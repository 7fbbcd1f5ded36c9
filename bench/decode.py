"""Decoding steps: AR and TiDAR by cache length and batch, the host's part, and simulated drafts.

An AR step has one query, a TiDAR step K + K². Their ratio is the number of tokens that a TiDAR
forward must make final to break even; it can make at most K. How many it does make depends on the
weights, so it is measured by the evals of a trained model. Here published numbers of tokens a
forward are *simulated*: steps are real, how many drafts each accepts is drawn, and the cache is set
back accordingly. The host's part of a step is its time with a model that costs nothing.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bench.inputs import model_config, new_model
from bench.measure import Work, ratio
from bench.results import Bench
from pipeline.decoding.choice import Conditions, accepted_probabilities, choose
from pipeline.decoding.engine import StepEngine
from pipeline.decoding.latency import measure_curve
from pipeline.decoding.sampling import Sampling
from pipeline.decoding.step import StepShape
from pipeline.model.draft_record import Acceptance
from pipeline.model.transformer import Transformer

STEPS_A_ROUND = 8
"""One step is too short for the clock."""
MOST_TOKENS = 512
"""Of one forward: a piece of a prompt, or a step's queries."""
PUBLISHED = {"TiDAR 1.5B": 7.45, "TiDAR 8B": 8.25}
"""Tokens per forward at K = 16 (arXiv 2511.08923)."""


@dataclass(frozen=True)
class Options:
    model: str = "tiny"
    """a shape of conf/model"""
    vocab_size: int = 2048
    """ids of the tokenizer; the last is the mask token"""
    block_sizes: tuple[int, ...] = (4, 8, 16)
    """K of the TiDAR variants"""
    cached: tuple[int, ...] = (128, 512, 1024, 2048, 4096)
    """tokens in the cache before a step"""
    batch_sizes: tuple[int, ...] = (1, 4, 16)
    """rows side by side, at the first number of cached tokens and the first K"""
    temperature: float = 0.0
    """0 is greedy"""
    simulated_steps: int = 40
    """steps of each simulated generation"""
    precision: str = "fp32"
    """fp32 or bf16"""
    draft_rank: int = 0
    """of a sequential draft head (GRU), whose part of a step is then measured; 0 is none"""
    parts: tuple[str, ...] = ("cached", "batch", "host", "simulated")
    """what is measured: `cached` and `batch` against AR, the `host` part, and `simulated` drafts"""


@torch.inference_mode()
def run(options: Options, bench: Bench) -> None:
    config = model_config(options.model, options.vocab_size, max(options.block_sizes))
    config = replace(config, draft_rank=options.draft_rank)
    model = new_model(config, options.precision, bench.device).eval()
    backend = model.for_decoding(1).backend
    bench.outcome.figures |= {
        "steps a round": STEPS_A_ROUND,
        "attention kernel": "torch's choice" if backend is None else backend.name,
    }
    first, sizes = options.cached[0], options.block_sizes
    blocks = {f"K={size}": StepShape.full(size) for size in sizes}
    if "cached" in options.parts:
        for cached in options.cached:
            _measure(bench, options, f"{cached} cached: ", model, cached, blocks)
    for batch in options.batch_sizes if "batch" in options.parts else ():
        if batch > 1:
            prefix, least = f"{first} cached, batch {batch}: ", f"K={sizes[0]}"
            _measure(bench, options, prefix, model, first, {least: blocks[least]}, batch=batch)
    if "host" in options.parts:
        shapes = {"ar": StepShape(1), f"K={sizes[0]}": StepShape.full(sizes[0])}
        parts = {f"host part of {name}": shape for name, shape in shapes.items()}
        free = FreeModel(model, sizes[0])
        _measure(bench, options, "", model, first, parts, dict.fromkeys(parts, free))
        if options.draft_rank:
            _head_part(model, options, bench)
    if "simulated" in options.parts:
        _simulate(model, options, bench)


def _measure(
    bench: Bench,
    options: Options,
    prefix: str,
    model: Transformer,
    cached: int,
    shapes: Mapping[str, StepShape],
    models: Mapping[str, Transformer] | None = None,
    batch: int = 1,
) -> None:
    """Steps of a batch by name, those of `models` or of `model`, beside an AR step of `model`."""
    shapes, models = {"ar": StepShape(1), **shapes}, models or {}
    samples = bench.time(
        {
            name: decoding_steps(models.get(name, model), cached, shape, options.temperature, batch)
            for name, shape in shapes.items()
        },
        prefix,
    )
    for name, shape in shapes.items():
        variant = bench.outcome.variants[prefix + name]
        variant["queries"] = batch * shape.num_queries
        seconds = variant["wall_seconds"]["median"] / STEPS_A_ROUND
        variant["milliseconds_per_forward"] = 1e3 * seconds
        if name != "ar":
            even = bench.divide(samples, name, "ar", prefix)["wall"]["of_medians"]
            if name.startswith("K="):
                bench.outcome.figures[f"{prefix}{name}: tokens a forward to break even"] = even


def _head_part(model: Transformer, options: Options, bench: Bench) -> None:
    """What the draft head takes of a step: steps of a model that costs nothing but its head, less
    the same without the head, over real steps."""
    size, prefix = options.block_sizes[0], "draft head: "
    models = {
        f"K={size}": model,
        "nothing but the head": FreeModel(model, size, with_head=True),
        "nothing": FreeModel(model, size),
    }
    shapes = dict.fromkeys(models, StepShape.full(size))
    _measure(bench, options, prefix, model, options.cached[0], shapes, models)
    whole, head, rest = (
        bench.outcome.variants[prefix + name]["milliseconds_per_forward"] for name in models
    )
    bench.outcome.figures["draft head: share of a step"] = (head - rest) / whole


def _simulate(model: Transformer, options: Options, bench: Bench) -> None:
    """Speed over AR at the published acceptance: every block, and the blocks that pay here."""
    size, cached, figures = max(options.block_sizes), options.cached[0], bench.outcome.figures
    curve = measure_curve(model, bench.rounds)
    for length, times in zip(curve.cached, curve.forward, strict=True):
        for queries, seconds in zip(curve.queries, times, strict=True):
            figures[f"latency curve, {length} cached, {queries} queries: ms"] = 1e3 * seconds
    for name, rate in PUBLISHED.items():
        acceptance = [_constant_acceptance(min(rate, 0.9 * size), size)] * (size - 1)
        known = Acceptance(acceptance, acceptance if model.draft_head is not None else None)
        greedy = options.temperature == 0
        choice = choose(known, Conditions(curve, cached, greedy=greedy))
        shapes = {"every block": StepShape.full(size), "chosen": choice.shape}
        works = {"ar": Simulation(model, StepShape(1), [], options)}
        for kind, shape in shapes.items():
            works[kind] = Simulation(model, shape, acceptance, options)
        prefix = f"simulated {name}, {cached} cached: "
        samples = bench.time(works, prefix)
        figures[f"{prefix}chosen step"] = str(choice)
        for kind in shapes:
            work, ar = works[kind], works["ar"]
            slower = ratio(samples[kind], samples["ar"])["wall"]["of_medians"]
            speedup = work.tokens / ar.tokens / slower
            forward = work.tokens / work.forwards
            bench.outcome.variants[prefix + kind]["simulated"] = True
            figures[f"{prefix}{kind}"] = (
                f"{forward:.2f} tokens a forward, {speedup:.2f} times AR, "
                f"conversion {speedup / forward:.0%}"
            )


def _constant_acceptance(tokens_per_step: float, size: int) -> float:
    """The acceptance, the same at every position, that gives so many tokens a step."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        chances = accepted_probabilities([middle] * (size - 1))
        expected = sum(count * chance for count, chance in enumerate(chances, 1))
        low, high = (middle, high) if expected < tokens_per_step else (low, middle)
    return low


def decoding_steps(
    model: Transformer, cached: int, shape: StepShape, temperature: float, batch: int = 1
) -> Work:
    """`STEPS_A_ROUND` steps over exactly `cached` kept tokens in each row."""
    engine = _engine(model, cached, shape, temperature, batch)

    def work() -> None:
        for _ in range(STEPS_A_ROUND):
            for row in range(batch):  # what the step before has kept is dropped again
                engine.rewind(row, cached, drafted=shape.drafting)
            engine.step()

    return work


class Simulation:
    """Real steps whose number of accepted drafts is drawn; the same draws every time it runs."""

    def __init__(
        self, model: Transformer, shape: StepShape, acceptance: list[float], options: Options
    ) -> None:
        count, self._cached = options.simulated_steps, options.cached[0]
        self._engine = _engine(
            model, self._cached, shape, options.temperature, more=count * shape.tokens
        )
        self._shape = shape
        rng, drafted = random.Random(0), shape.drafting
        self._plan: list[tuple[int, bool]] = []
        """Tokens of each step, and whether a draft is there afterwards."""
        for _ in range(count):
            accepted = 1
            limit = shape.tokens if drafted else 1
            while accepted < limit and rng.random() < acceptance[accepted - 1]:
                accepted += 1
            drafted = (shape if drafted else shape.short).drafted_after(accepted)
            self._plan.append((accepted, drafted))
        self.tokens = sum(accepted for accepted, _ in self._plan)
        self.forwards = count

    def __call__(self) -> None:
        length = self._cached
        self._engine.rewind(0, length, drafted=self._shape.drafting)
        for accepted, drafted in self._plan:
            self._engine.step()
            length += accepted
            self._engine.rewind(0, length, drafted=drafted)


def _engine(
    model: Transformer, cached: int, shape: StepShape, temperature: float, batch: int = 1,
    more: int = 1,
) -> StepEngine:  # fmt: skip
    """Every row has read a random prompt of `cached` tokens and has room for `more`."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, model.config.num_embeddings - 1, (cached,), generator=generator)
    sampling = Sampling(temperature=temperature)
    engine = StepEngine(
        model, sampling, shape, batch_size=batch, capacity=cached + more, graphs=True
    )
    for row in range(batch):
        engine.admit(row, prompt.to(device), seed=row)
    return engine


class FreeModel(Transformer):
    """A model that costs nothing: gives back tensors that were made beforehand, of the shapes that
    `like` gives; `with_head` keeps its draft head, which then is all that costs anything."""

    def __init__(self, like: Transformer, block_size: int, with_head: bool = False) -> None:
        nn.Module.__init__(self)
        config = like.config
        first = next(like.parameters())
        self.config = config
        self._weight = nn.Parameter(torch.zeros((), dtype=first.dtype, device=first.device))
        tokens = max(MOST_TOKENS + block_size, block_size + block_size**2)
        self._hidden = torch.zeros(1, tokens, config.hidden_size).to(first)
        self._logits = torch.zeros(1, 2 * block_size, config.num_embeddings).to(first)
        self.lm_head = self.logits  # type: ignore[assignment]
        self.draft_head = like.draft_head if with_head else None
        self.model = like.model

    def for_decoding(self, positions: int) -> "FreeModel":  # type: ignore[override]
        return self

    def hidden(self, input_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        return self._hidden[:, : input_ids.shape[1]]

    def logits(self, hidden: Tensor) -> Tensor:
        return self._logits[:, : hidden.shape[1]]
