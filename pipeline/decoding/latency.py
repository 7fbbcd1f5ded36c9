"""The latency curve: what a forward takes by its query tokens and by the tokens in the cache.

Measured once for each model shape, type, device and number of threads, then read from a file in
the user's cache folder (`$XDG_CACHE_HOME/tidar-pretrain`, `~/.cache/tidar-pretrain`).
"""

import hashlib
import json
import logging
import os
import statistics
from bisect import bisect_right
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.files import write_text_atomic
from pipeline.decoding.batch import clock
from pipeline.decoding.cache import KVCache
from pipeline.decoding.graphs import GraphedSteps
from pipeline.model.transformer import Transformer

VERSION = 1
QUERIES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CACHED = (128, 512, 2048)
ROUNDS = 7
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
    head: tuple[float, ...]
    """The LM head over as many rows as there are `queries`."""

    def step_seconds(self, queries: int, rows: int, cached: int) -> float:
        """A forward of `queries` tokens over `cached` ones, with logits of `rows` of them."""
        times = [_along(self.queries, row, queries) for row in self.forward]
        return _along(self.cached, times, cached) + _along(self.queries, self.head, rows)


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
            tuple(values["head"]),
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
    begun = clock(next(model.parameters()).device)
    limit = max(model.config.max_positions - 1, 1)
    cached = tuple(dict.fromkeys(min(length, limit) for length in CACHED))
    first = next(model.parameters())
    cache = KVCache(model.config, cached[-1] + QUERIES[-1], dtype=first.dtype, device=first.device)
    ids = torch.zeros(1, QUERIES[-1], dtype=torch.int64, device=first.device)
    positions = torch.arange(cached[-1] + QUERIES[-1], device=first.device)
    rows = torch.zeros(QUERIES[-1], model.config.hidden_size, dtype=first.dtype).to(first.device)
    graphs = GraphedSteps(first.device) if first.device.type == "cuda" else None
    warmup = 1 if graphs is None else 2  # a captured forward runs once as it is, then is captured
    taken: dict[Hashable, list[float]] = {}

    def measure(key: Hashable, work: Callable[[], Tensor]) -> None:
        started = clock(first.device)
        work() if graphs is None else graphs(key, work)
        taken.setdefault(key, []).append(clock(first.device) - started)

    for number in range(rounds + warmup):
        spent = clock(first.device) - begun
        if number == 1 and spent * rounds > ENOUGH_SECONDS / 4:
            logging.getLogger(__name__).warning(
                "measuring what a forward takes here, once for this model and device"
            )
        if number > warmup and spent > ENOUGH_SECONDS:
            break
        for queries in QUERIES:
            for length in cached:
                cache.length = length
                where = positions[length : length + queries]
                work = partial(model.hidden, ids[:, :queries], where, cache=cache)
                measure((length, queries), work)
            measure(queries, partial(model.lm_head, rows[:queries]))
    medians = {key: statistics.median(times[warmup:]) for key, times in taken.items()}
    return LatencyCurve(
        QUERIES,
        cached,
        tuple(tuple(medians[length, queries] for queries in QUERIES) for length in cached),
        tuple(medians[queries] for queries in QUERIES),
    )


def _cpu() -> str:
    return (
        f"cpu {os.cpu_count()} {torch.get_num_threads()} {torch.backends.cpu.get_cpu_capability()}"
    )


def _file(model: Transformer) -> Path:
    key = hashlib.sha256(json.dumps(identity(model), sort_keys=True).encode()).hexdigest()[:16]
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "tidar-pretrain" / f"latency-{key}.json"
