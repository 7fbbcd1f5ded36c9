"""The latency curve: what a step takes by its query tokens, its drafts and the cached tokens.

A step is a forward up to the last hidden states, and what comes after: logits, verification, and
drawing the next draft, in order of places where the model has a draft head. The second part is the
difference between real steps and such a forward, so that nothing a step does is left out. Measured
once for each model shape, type, device and number of threads, then read from a file in
the user's cache folder (`$XDG_CACHE_HOME/tidar-pretrain`, `~/.cache/tidar-pretrain`).
"""

import hashlib
import json
import logging
import os
import statistics
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.decoding.batch import clock
from pipeline.decoding.cache import KVCache
from pipeline.decoding.engine import StepEngine
from pipeline.decoding.graphs import WIDTH_STEP, GraphedSteps
from pipeline.decoding.sampling import Sampling
from pipeline.decoding.step import StepRule, StepShape
from pipeline.model.transformer import Transformer
from tidar_common.files import write_text_atomic

VERSION = 3
QUERIES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CACHED = (128, 512, 2048)
SIZES = (1, 4, 16)
"""Tokens in hand of the steps that are measured whole."""
ROUNDS = 7
Point = tuple[Hashable, Callable[[], object]]
"""What is measured, and how it is run once."""
ENOUGH_SECONDS = 20.0
"""No further round begins after so long: a large model on a CPU needs no more for its medians."""


@dataclass(frozen=True)
class LatencyCurve:
    """Seconds of a forward; between the points, and beyond the last, along straight lines."""

    queries: tuple[int, ...]
    """Query tokens, increasing."""
    cached: tuple[int, ...]
    """Cached tokens, increasing."""
    forward: tuple[tuple[float, ...], ...]
    """Up to the last hidden state, for each of `cached` and each of `queries`."""
    sizes: tuple[int, ...]
    """Tokens in hand, increasing."""
    greedy: tuple[float, ...]
    """What comes after the forward, for each of `sizes`, at temperature 0."""
    drawn: tuple[float, ...]
    """The same at temperature 1."""

    def step_seconds(self, queries: int, size: int, cached: int, greedy: bool = True) -> float:
        """A step of `queries` tokens over `cached` ones, `size` of them in hand."""
        times = [_along(self.queries, row, queries) for row in self.forward]
        rest = _along(self.sizes, self.greedy if greedy else self.drawn, size)
        return _along(self.cached, times, cached) + rest


def _along(places: Sequence[int], values: Sequence[float], place: float) -> float:
    """Linear interpolation; flat before the first place, and continued beyond the last."""
    if len(places) == 1 or place <= places[0]:
        return values[0]
    right = min(bisect_right(places, place), len(places) - 1)
    left = right - 1
    share = (place - places[left]) / (places[right] - places[left])
    return values[left] + share * (values[right] - values[left])


def latency_curve(model: Transformer) -> LatencyCurve:
    """The curve of `model` where it is now: from the file, or measured and written there."""
    path = _file(model)
    try:
        values = json.loads(path.read_text())
        return LatencyCurve(
            tuple(values["queries"]),
            tuple(values["cached"]),
            tuple(tuple(row) for row in values["forward"]),
            tuple(values["sizes"]),
            tuple(values["greedy"]),
            tuple(values["drawn"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        curve = measure_curve(model)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path, json.dumps({**identity(model), **asdict(curve)}) + "\n")
    except OSError:
        pass  # without the file the next process measures again
    return curve


def identity(model: Transformer) -> dict[str, Any]:
    """What a curve depends on."""
    first = next(model.parameters())
    device = first.device
    return {
        "version": VERSION,
        "model": model.config.to_dict(),
        "dtype": str(first.dtype),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        "torch": torch.__version__,
    }


@torch.inference_mode()
def measure_curve(model: Transformer, rounds: int = ROUNDS) -> LatencyCurve:
    """Medians over `rounds`, all points in turn in each, so that a slow spell meets all alike.

    On a GPU the forwards are captured, as those of decoding are: launched kernel by kernel, small
    forwards would all take the same.
    """
    device = next(model.parameters()).device
    begun = clock(device)
    limit = max(model.config.max_positions - 1, 1)
    cached = tuple(dict.fromkeys(min(length, limit) for length in CACHED))
    forwards, steps = _Forwards(model, cached), _Steps(model, min(CACHED[0], limit))
    taken: dict[Hashable, list[float]] = {}
    warmup = 1 if device.type == "cpu" else 2  # a captured one runs once as it is, then is captured
    for number in range(rounds + warmup):
        spent = clock(device) - begun
        if number == 1 and spent * rounds > ENOUGH_SECONDS / 4:
            logging.getLogger(__name__).warning(
                "measuring what a step takes here, once for this model and device"
            )
        if number > warmup and spent > ENOUGH_SECONDS:
            break
        for key, run in (*forwards.points(), *steps.points()):
            started = clock(device)
            run()
            taken.setdefault(key, []).append(clock(device) - started)
    medians = {key: statistics.median(times[warmup:]) for key, times in taken.items()}
    forward = tuple(tuple(medians[length, queries] for queries in QUERIES) for length in cached)
    bare = LatencyCurve(QUERIES, cached, forward, (1,), (0.0,), (0.0,))
    rests: list[tuple[float, ...]] = []
    for temperature in (0.0, 1.0):
        beyond = [
            medians[temperature, shape] - bare.step_seconds(shape.num_queries, 1, steps.cached)
            for shape in steps.shapes
        ]
        rests.append(tuple(max(0.0, rest) for rest in beyond))
    sizes = tuple(shape.tokens for shape in steps.shapes)
    return LatencyCurve(QUERIES, cached, forward, sizes, *rests)


class _Forwards:
    """Forwards up to the last hidden states, of all `QUERIES` over all lengths `cached`, as steps
    run them: with their mask, their cache and their kernels."""

    def __init__(self, model: Transformer, cached: tuple[int, ...]) -> None:
        first = next(model.parameters())
        room = -(-(cached[-1] + QUERIES[-1]) // WIDTH_STEP) * WIDTH_STEP
        self.forward, self.lengths = model.for_decoding(room), cached
        self.cache = KVCache(
            model.config, room, dtype=first.dtype, device=first.device, ragged=first.is_cuda
        )
        self.ids = torch.zeros(1, QUERIES[-1], dtype=torch.int64, device=first.device)
        captured = first.is_cuda and model.config.hosted is None
        self.graphs = GraphedSteps(first.device) if captured else None
        self.rules = {
            queries: StepRule(StepShape(queries), room, first.device, first.dtype)
            for queries in QUERIES
        }

    def points(self) -> Iterator[Point]:
        for queries, length in product(QUERIES, self.lengths):
            yield (length, queries), partial(self._run, queries, length)

    def _run(self, queries: int, length: int) -> None:
        self.cache.set_length(0, length)
        self.cache.make_room(queries, WIDTH_STEP)
        work = partial(self._forward, self.rules[queries])
        work() if self.graphs is None else self.graphs((queries, self.cache.width), work)

    def _forward(self, rule: StepRule) -> Tensor:
        ids, positions = self.ids[:, : len(rule.offsets)], self.cache.positions(rule.offsets)
        return self.forward.hidden(ids, positions, self.cache.bias(rule), self.cache)


class _Steps:
    """Whole steps of `SIZES` tokens in hand, greedy and drawn, always over the same cache."""

    def __init__(self, model: Transformer, cached: int) -> None:
        self.cached = max(1, min(cached, model.config.max_positions - SIZES[-1]))
        headed = model.draft_head is not None
        self.shapes = [StepShape(1)]
        for size in SIZES[1:]:
            # Without a head a draft takes the logits of a block; with one it takes no block at all.
            blocks = () if headed else (1,)
            if headed or model.config.mask_token_id is not None:
                self.shapes.append(StepShape(size, size, blocks))
        self.engines = {
            (temperature, shape): StepEngine(
                model, Sampling(temperature=temperature), shape, capacity=self.cached + SIZES[-1],
                graphs=True,
            )
            for temperature in (0.0, 1.0)
            for shape in self.shapes
        }  # fmt: skip
        prompt = torch.zeros(self.cached, dtype=torch.int64)
        for engine in self.engines.values():
            engine.admit(0, prompt.to(engine.device), 0)

    def points(self) -> Iterator[Point]:
        for key, engine in self.engines.items():
            yield key, partial(self._run, engine)

    def _run(self, engine: StepEngine) -> None:
        engine.step()
        engine.rewind(0, self.cached, drafted=engine.shape.drafting)


def _cpu() -> str:
    return (
        f"cpu {os.cpu_count()} {torch.get_num_threads()} {torch.backends.cpu.get_cpu_capability()}"
    )


def _file(model: Transformer) -> Path:
    key = hashlib.sha256(json.dumps(identity(model), sort_keys=True).encode()).hexdigest()[:16]
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "tidar-pretrain" / f"latency-{key}.json"
