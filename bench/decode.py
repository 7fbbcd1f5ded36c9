"""Decoding steps: AR and TiDAR by cache length and batch, the host's part, and simulated drafts.

An AR step has one query, a TiDAR step K + K². Their ratio is the number of tokens that a TiDAR
forward must make final to break even; it can make at most K. How many it does make depends on the
weights, so it is measured by the evals of a trained model. Here published numbers of tokens a
forward are *simulated*: steps are real, how many drafts each accepts is drawn, and the cache is set
back accordingly. The host's part of a step is its time with a model that costs nothing.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from bench.decode_models import FreeModel
from bench.inputs import model_config, new_model
from bench.measure import Work, interleaved, ratio
from bench.results import Outcome
from pipeline.decoding.choice import Conditions, accepted_probabilities, choose
from pipeline.decoding.engine import StepEngine
from pipeline.decoding.latency import measure_curve
from pipeline.decoding.sampling import Sampling
from pipeline.decoding.step import StepShape
from pipeline.model.draft_record import Acceptance
from pipeline.model.transformer import Transformer

STEPS_A_ROUND = 8
"""One step is too short for the clock."""
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
def run(options: Options, device: torch.device, rounds: int, warmup: int) -> Outcome:
    config = model_config(options.model, options.vocab_size, max(options.block_sizes))
    config = replace(config, draft_rank=options.draft_rank)
    model = new_model(config, options.precision, device).eval()
    outcome = Outcome()
    outcome.figures["steps a round"] = STEPS_A_ROUND
    backend = model.for_decoding(1).backend
    outcome.figures["attention kernel"] = "torch's choice" if backend is None else backend.name

    def measure(prefix: str, steps: dict[str, Work], queries: dict[str, int]) -> None:
        samples = interleaved(steps, rounds=rounds, warmup=warmup, device=device)
        outcome.add(samples, prefix)
        for name in steps:
            variant = outcome.variants[prefix + name]
            variant["queries"] = queries[name]
            seconds = variant["wall_seconds"]["median"] / STEPS_A_ROUND
            variant["milliseconds_per_forward"] = 1e3 * seconds
            if name != "ar":
                found = ratio(samples[name], samples["ar"])
                outcome.ratios[f"{prefix}{name} / ar"] = found
                if name.startswith("K="):
                    even = found["wall"]["of_medians"]
                    outcome.figures[f"{prefix}{name}: tokens a forward to break even"] = even

    if "cached" in options.parts:
        for cached in options.cached:
            _compare(model, options, cached, 1, options.block_sizes, measure)
    for batch in options.batch_sizes if "batch" in options.parts else ():
        if batch > 1:
            _compare(model, options, options.cached[0], batch, options.block_sizes[:1], measure)
    if "host" in options.parts:
        _host_part(model, options, measure)
        if options.draft_rank:
            _head_part(model, options, measure, outcome)
    if "simulated" in options.parts:
        _simulate(model, options, device, (rounds, warmup), outcome)
    return outcome


Measure = Callable[[str, dict[str, Work], dict[str, int]], None]


def _compare(
    model: Transformer,
    options: Options,
    cached: int,
    batch: int,
    sizes: tuple[int, ...],
    measure: Measure,
) -> None:
    """AR and TiDAR steps of a batch, side by side."""
    shapes = {"ar": StepShape(1), **{f"K={size}": StepShape.full(size) for size in sizes}}
    steps = {
        name: decoding_steps(model, cached, shape, options.temperature, batch)
        for name, shape in shapes.items()
    }
    rows = f", batch {batch}" if batch > 1 else ""
    queries = {name: batch * shape.num_queries for name, shape in shapes.items()}
    measure(f"{cached} cached{rows}: ", steps, queries)


def _host_part(model: Transformer, options: Options, measure: Measure) -> None:
    """Steps with a model that costs nothing, against a real AR step."""
    cached, size = options.cached[0], options.block_sizes[0]
    free = FreeModel(model, options.block_sizes[0])
    shapes = {"host part of ar": StepShape(1), f"host part of K={size}": StepShape.full(size)}
    steps = {"ar": decoding_steps(model, cached, StepShape(1), options.temperature)}
    for name, shape in shapes.items():
        steps[name] = decoding_steps(free, cached, shape, options.temperature)
    measure("", steps, {"ar": 1, **{name: shape.num_queries for name, shape in shapes.items()}})


def _head_part(model: Transformer, options: Options, measure: Measure, outcome: Outcome) -> None:
    """What the draft head takes of a step: steps of a model that costs nothing but its head, less
    the same without the head, over real steps."""
    cached, size = options.cached[0], options.block_sizes[0]
    shape, prefix = StepShape.full(size), "draft head: "
    models = {
        f"K={size}": model,
        "nothing but the head": FreeModel(model, size, with_head=True),
        "nothing": FreeModel(model, size),
    }
    steps = {
        name: decoding_steps(one, cached, shape, options.temperature)
        for name, one in models.items()
    }
    steps["ar"] = decoding_steps(model, cached, StepShape(1), options.temperature)
    measure(prefix, steps, {**dict.fromkeys(models, shape.num_queries), "ar": 1})
    whole, own, rest = (
        outcome.variants[prefix + name]["milliseconds_per_forward"] for name in models
    )
    outcome.figures["draft head: share of a step"] = (own - rest) / whole


def _simulate(
    model: Transformer,
    options: Options,
    device: torch.device,
    rounds: tuple[int, int],
    outcome: Outcome,
) -> None:
    """Speed over AR at the published acceptance: every block, and the blocks that pay here."""
    size, cached = max(options.block_sizes), options.cached[0]
    curve = measure_curve(model, rounds[0])
    for length, times in zip(curve.cached, curve.forward, strict=True):
        for queries, seconds in zip(curve.queries, times, strict=True):
            name = f"latency curve, {length} cached, {queries} queries: ms"
            outcome.figures[name] = 1e3 * seconds
    for name, rate in PUBLISHED.items():
        acceptance = [_constant_acceptance(min(rate, 0.9 * size), size)] * (size - 1)
        known = Acceptance(acceptance, acceptance if model.draft_head is not None else None)
        greedy = options.temperature == 0
        choice = choose(known, Conditions(curve, cached, greedy=greedy))
        shapes = {"every block": StepShape.full(size), "chosen": choice.shape}
        work = {"ar": Simulation(model, StepShape(1), [], options)}
        for kind, shape in shapes.items():
            work[kind] = Simulation(model, shape, acceptance, options)
        samples = interleaved(work, rounds=rounds[0], warmup=rounds[1], device=device)
        prefix = f"simulated {name}, {cached} cached: "
        outcome.add(samples, prefix)
        outcome.figures[f"{prefix}chosen step"] = str(choice)
        for kind in shapes:
            own, ar = work[kind], work["ar"]
            slower = ratio(samples[kind], samples["ar"])["wall"]["of_medians"]
            speedup = own.tokens / ar.tokens / slower
            forward = own.tokens / own.forwards
            outcome.variants[prefix + kind]["simulated"] = True
            outcome.figures[f"{prefix}{kind}"] = (
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
        self,
        model: Transformer,
        shape: StepShape,
        acceptance: list[float],
        options: Options,
    ) -> None:
        count, self._cached = options.simulated_steps, options.cached[0]
        self._engine = _engine(
            model, self._cached, shape, options.temperature, more=count * shape.drafts
        )
        self._shape = shape
        rng, drafted = random.Random(0), shape.drafting
        self._plan: list[tuple[int, bool]] = []
        """Tokens of each step, and whether a draft is there afterwards."""
        for _ in range(count):
            accepted = 1
            limit = shape.drafts if drafted else 1
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
    model: Transformer,
    cached: int,
    shape: StepShape,
    temperature: float,
    batch: int = 1,
    more: int = 1,
) -> StepEngine:
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
