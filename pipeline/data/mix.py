"""Several prepared sets as one: each with a share of the tokens that may change over the run.

Which sequence of which set is the n-th of the run is a pure function of (seed, the sets'
fingerprints, their weights), so `sequences_seen` stays the loader's whole state. Every window of
`WINDOW` sequences has each set's share of them in a random order, and each set is read in its own
`SequenceOrder`, from epoch to epoch, however often its weight changes.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.formats.groups import PackedSequence
from data_prep.formats.manifest import Manifest
from pipeline.data.place import DataConfig, open_place
from pipeline.data.source import DamagedShard, LayoutChoice, SequenceSource
from tidar_common.config import config_hash
from tidar_common.errors import UserError

WINDOW = 10_000
"""Sequences in which every set has its share exactly, to one of them."""
KEYS = {"dir", "weight"}


@dataclass(frozen=True)
class MixedSet:
    """One of the sets."""

    name: str
    dir: Path
    manifest: Manifest
    weights: tuple[tuple[int, float], ...]
    """(first optimizer step, share of the tokens from it on), in order, the first from step 0."""

    def weight_at(self, step: int) -> float:
        return self.weights[bisect_right([first for first, _ in self.weights], step) - 1][1]


def open_mix(config: DataConfig, main: Manifest, choice: LayoutChoice) -> tuple[MixedSet, ...]:
    """The sets of `data.mix` in the order of their fingerprints; empty where there is no mix.

    Raises:
        UserError: naming the set that cannot be read, or that does not go with `data.dir`, whose
            manifest `main` is.
    """
    if config.mix is None:
        return ()
    if len(config.mix) < 2:
        raise UserError("data.mix: needs two sets or more; for one use data.dir alone")
    sets: dict[str, MixedSet] = {}
    for name, values in config.mix.items():
        key = f"data.mix.{name}"
        if not isinstance(values, dict) or set(values) != KEYS:
            raise UserError(f"{key}: needs the keys dir and weight, and no other")
        weights = _checked_weights(f"{key}.weight", values["weight"])
        folder = open_place(str(values["dir"]), config, f"{key}.dir")
        mixed = MixedSet(str(name), folder, Manifest.load(folder), weights)
        _check_goes_with(key, mixed, main, choice)
        same = sets.setdefault(mixed.manifest.fingerprint(), mixed)
        if same is not mixed:
            raise UserError(f"{key}: is the same data as data.mix.{same.name}; leave out one")
    for step in _steps(sets.values()):
        if sum(mixed.weight_at(step) for mixed in sets.values()) <= 0:
            raise UserError(f"data.mix: all weights are 0 from step {step} on")
    return tuple(sets[fingerprint] for fingerprint in sorted(sets))


def _checked_weights(key: str, value: Any) -> tuple[tuple[int, float], ...]:
    steps = value if isinstance(value, dict) else {0: value}
    numbers = [*steps, *steps.values()]
    if any(isinstance(n, bool) or not isinstance(n, int | float) or n < 0 for n in numbers):
        raise UserError(
            f"{key}: must be a number of at least 0, or such numbers by optimizer step, as in "
            f"{{0: 0.7, 2000: 0.3}}; got {value!r}"
        )
    if any(not isinstance(step, int) for step in steps) or 0 not in steps:
        raise UserError(f"{key}: its steps must be whole numbers, the first of them 0")
    return tuple(sorted((step, float(weight)) for step, weight in steps.items()))


def _check_goes_with(key: str, mixed: MixedSet, main: Manifest, choice: LayoutChoice) -> None:
    manifest = mixed.manifest
    if manifest.tokenizer.sha256 != main.tokenizer.sha256:
        raise UserError(
            f"{key}: {mixed.dir} was prepared with another tokenizer than data.dir; prepare it "
            "with tokenizer.path=... of that folder"
        )
    if manifest.sequence_length != main.sequence_length:
        raise UserError(
            f"{key}: {mixed.dir} has sequences of {manifest.sequence_length} tokens, data.dir of "
            f"{main.sequence_length}; prepare it with sequence_length={main.sequence_length}"
        )
    for name in ("block_size", "coverage"):
        if getattr(choice, name) is None and getattr(manifest, name) != getattr(main, name):
            raise UserError(
                f"{key}: {mixed.dir} was prepared with layout.{name}={getattr(manifest, name)}, "
                f"data.dir with {getattr(main, name)}; set layout.{name}=... to lay out all anew"
            )


def _steps(sets: Any) -> list[int]:
    """The steps at which some weight changes, 0 among them."""
    return sorted({step for mixed in sets for step, _ in mixed.weights})


def mix_identity(sets: Sequence[MixedSet]) -> tuple[str, dict[str, Any]]:
    """What a continued run must not change: the data, and the weights by name and step."""
    data = config_hash(sorted(mixed.manifest.fingerprint() for mixed in sets))
    named = sorted(sets, key=lambda mixed: mixed.name)
    return data, {mixed.name: {str(step): w for step, w in mixed.weights} for mixed in named}


class MixOrder:
    """Which set the n-th sequence of the run comes from, and which of its own order it is.

    Args:
        phases: (first sequence number, weight of each set among the sequences from it on), in
            order, the first from 0.
        seed: of the order inside windows.

    Raises:
        UserError: when a weight is above 0 and too small to come up in a window.
    """

    def __init__(self, phases: Sequence[tuple[int, Sequence[float]]], seed: int) -> None:
        self._seed = seed
        self._starts = [start for start, _ in phases]
        self._counts = [_counts_in_window(np.asarray(weights)) for _, weights in phases]
        self._window = lru_cache(maxsize=4)(self._drawn_window)
        self._bases = [np.zeros(len(self._counts[0]), dtype=np.int64)]
        for start in self._starts[1:]:
            # As the phase before it leaves them: `before` looks no further than what is there.
            self._bases.append(self._sums(len(self._bases) - 1, start))

    def __getitem__(self, n: int) -> tuple[int, int]:
        """(set, number in the set's own order) of the n-th sequence of the run."""
        phase = bisect_right(self._starts, n) - 1
        window, inside = divmod(n - self._starts[phase], WINDOW)
        sets, ranks = self._window(phase, window)
        chosen = int(sets[inside])
        taken = int(self._bases[phase][chosen]) + window * int(self._counts[phase][chosen])
        return chosen, taken + int(ranks[inside])

    def before(self, n: int) -> NDArray[np.int64]:
        """How many of the first `n` sequences come from each set, [sets]."""
        return self._sums(bisect_right(self._starts, n) - 1, n)

    def _sums(self, phase: int, n: int) -> NDArray[np.int64]:
        window, inside = divmod(n - self._starts[phase], WINDOW)
        counts = self._counts[phase]
        begun = np.bincount(self._window(phase, window)[0][:inside], minlength=len(counts))
        return self._bases[phase] + window * counts + begun

    def _drawn_window(self, phase: int, window: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The set of each place, and how many places of the same set stand before it."""
        counts = self._counts[phase]
        rng = np.random.default_rng([self._seed, self._starts[phase], window, 1])
        sets = rng.permutation(np.repeat(np.arange(len(counts)), counts))
        ranks = np.empty_like(sets)
        first = np.repeat(np.cumsum(counts) - counts, counts)
        ranks[np.argsort(sets, kind="stable")] = np.arange(WINDOW) - first
        return sets, ranks


def _counts_in_window(weights: NDArray[np.float64]) -> NDArray[np.int64]:
    """`WINDOW` divided by the weights, the largest remainders rounded up."""
    exact = weights / weights.sum() * WINDOW
    counts = np.floor(exact).astype(np.int64)
    rest = WINDOW - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:rest]] += 1
    if ((weights > 0) & (counts == 0)).any():
        raise UserError(f"data.mix: a weight is less than one of {WINDOW:,}; use 0 or raise it")
    return counts


class MixedSource:
    """The sequences of all sets in the run's order; `source[n]` is the n-th."""

    def __init__(
        self,
        sets: Sequence[MixedSet],
        manifest: Manifest,
        seed: int,
        choice: LayoutChoice,
        data: DataConfig,
        sequences_per_step: int,
    ) -> None:
        """`manifest` is that of `data.dir`; the steps of weights have `sequences_per_step`."""
        self.manifest = manifest
        self.sets = sets
        self.sources = [
            SequenceSource(mixed.dir, mixed.manifest, mixed.manifest.train, seed, choice, data)
            for mixed in sets
        ]
        # Weights are shares of the tokens, and a set with more padding has fewer in a sequence.
        full = [mixed.manifest.train.tokens / mixed.manifest.train.sequences for mixed in sets]
        self.order = MixOrder(
            [
                (
                    step * sequences_per_step,
                    [m.weight_at(step) / tokens for m, tokens in zip(sets, full, strict=True)],
                )
                for step in _steps(sets)
            ],
            seed,
        )
        self._sequences_per_step = sequences_per_step

    def __getitem__(self, n: int) -> PackedSequence:
        chosen, number = self.order[n]
        return self.sources[chosen].at_step(number, n // self._sequences_per_step)

    @property
    def block_size(self) -> int:
        return self.sources[0].block_size

    @property
    def block_slots(self) -> int:
        return self.sources[0].block_slots

    @property
    def coverage(self) -> float:
        return self.sources[0].coverage

    @property
    def epoch_sequences(self) -> int:
        """Sequences of all sets together."""
        return sum(source.epoch_sequences for source in self.sources)

    def damaged_shards(self) -> list[DamagedShard]:
        """Those of all sets, in the order in which they came up."""
        shards = [
            replace(damaged, set=mixed.name)
            for mixed, source in zip(self.sets, self.sources, strict=True)
            for damaged in source.damaged_shards()
        ]
        return sorted(shards, key=lambda damaged: damaged.step)

    def epochs(self, sequences: int) -> dict[str, float]:
        """How often the first `sequences` of the run read each set, by name."""
        taken = self.order.before(sequences).tolist()
        rows = zip(self.sets, self.sources, taken, strict=True)
        return {mixed.name: count / source.epoch_sequences for mixed, source, count in rows}

    def describe(self, sequences: int) -> str:
        """A line: what share of the first `sequences` each set has, and how often it is read."""
        taken, epochs = self.order.before(sequences).tolist(), self.epochs(sequences)
        return "data.mix: " + ", ".join(
            f"{mixed.name} {count / max(sequences, 1):.1%} of the sequences, read "
            f"{epochs[mixed.name]:.2f} times"
            for mixed, count in zip(self.sets, taken, strict=True)
        )
