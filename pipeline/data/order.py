"""Which sequence is the n-th: a pure function of (seed, epoch, manifest); and how far a run is.

World size, worker count and interruptions have no part in it, so the loader's whole state is one
integer, `sequences_seen`. Reading stays sequential in large pieces: shards are permuted, then the
groups inside a shard, then the sequences inside a group. `TrainState` holds that integer and the
few others that are saved with every checkpoint.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray


def numbers_after(position: int, count: int, left_out: Sequence[tuple[int, int]]) -> list[int]:
    """The next `count` order numbers from `position` on, without those that are left out.

    Args:
        position: the first that may be taken.
        count: how many.
        left_out: ranges (first, behind the last), sorted and disjoint.
    """
    numbers: list[int] = []
    for first, end in left_out:
        if position < first:
            numbers.extend(range(position, min(first, position + count - len(numbers))))
            if len(numbers) == count:
                return numbers
        position = max(position, end)
    numbers.extend(range(position, position + count - len(numbers)))
    return numbers


@dataclass(frozen=True)
class StoredAt:
    """Where the n-th sequence stands."""

    epoch: int
    shard: int
    """Index into the manifest's list of shards."""
    index: int
    """Index of the sequence inside its shard."""


class SequenceOrder:
    """The order of all epochs over shards that hold `shard_sequences` sequences each."""

    def __init__(self, shard_sequences: Sequence[int], group_size: int, seed: int) -> None:
        if not shard_sequences or min(shard_sequences) < 1 or group_size < 1:
            raise ValueError("an order needs at least one shard, and no shard or group empty")
        self._sizes = list(shard_sequences)
        self._group_size = group_size
        self._seed = seed
        self.epoch_sequences = sum(self._sizes)
        # One order holds these caches, so that two orders never mix.
        self._shards_of = lru_cache(maxsize=2)(self._permuted_shards)
        self._sequences_of = lru_cache(maxsize=8)(self._permuted_sequences)

    def __getitem__(self, n: int) -> StoredAt:
        """The n-th sequence of the run, counted from 0 over all epochs."""
        epoch, offset = divmod(n, self.epoch_sequences)
        shards, ends = self._shards_of(epoch)
        rank = bisect_right(ends, offset)
        shard = shards[rank]
        inside = offset - (ends[rank] - self._sizes[shard])
        return StoredAt(epoch, shard, int(self._sequences_of(epoch, shard)[inside]))

    def _permuted_shards(self, epoch: int) -> tuple[list[int], list[int]]:
        """The shards in the order of the epoch, and how many sequences have come with each."""
        shards = np.random.default_rng([self._seed, epoch]).permutation(len(self._sizes)).tolist()
        return shards, list(accumulate(self._sizes[shard] for shard in shards))

    def _permuted_sequences(self, epoch: int, shard: int) -> NDArray[np.int64]:
        rng = np.random.default_rng([self._seed, epoch, shard + 1])
        size, group = self._sizes[shard], self._group_size
        starts = np.arange(0, size, group)
        return np.concatenate(
            [
                start + rng.permutation(min(group, size - start))
                for start in starts[rng.permutation(len(starts))]
            ]
        )


EMPTY_DIGEST = hashlib.sha256(b"").hexdigest()


@dataclass
class TrainState:
    """Progress of a run. The order of data is a pure function, so these few numbers are all."""

    step: int = 0
    """Optimizer steps done."""
    sequences_seen: int = 0
    """Of the run's order: all before this number were consumed or left out."""
    tokens: int = 0
    """Clean tokens without padding."""
    data_digest: str = EMPTY_DIGEST
    """Running SHA-256 over the sequences consumed, in order; equal iff the data was equal."""

    left_out: list[tuple[int, int]] = field(default_factory=list)
    """Ranges of order numbers (first, behind the last) that are passed over; sorted, disjoint."""
    anomalies: dict[str, Any] = field(default_factory=dict)
    """What the scores of the next steps are compared with; see `anomalies.Anomalies`."""

    def consume(self, sequence_digests: list[bytes]) -> None:
        """Take the digests of a step's sequences, in the global order, into account."""
        current = bytes.fromhex(self.data_digest)
        for digest in sequence_digests:
            current = hashlib.sha256(current + digest).digest()
        self.data_digest = current.hex()
        numbers = numbers_after(self.sequences_seen, len(sequence_digests), self.left_out)
        self.sequences_seen = numbers[-1] + 1

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainState":
        known = {entry.name: values[entry.name] for entry in fields(cls) if entry.name in values}
        known["left_out"] = [(first, end) for first, end in known.get("left_out", [])]
        return cls(**known)
