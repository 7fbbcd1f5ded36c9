"""Pairs of neighbouring tokens of a training split, counted once in a process."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.formats.groups import PackedSequence
from data_prep.formats.manifest import Manifest
from data_prep.formats.shards import ShardReader
from pipeline.data.remote import local_shard
from pipeline.objective.controls import PairCounts
from tidar_common.errors import UserError

PAIR_TOKENS = 4_000_000
"""Tokens of the training split whose pairs are counted, at most."""
PAIR_SHARDS = 16
"""Shards that they come from, at most: those of a remote folder are copied whole."""
_COUNTED: dict[str, PairCounts | None] = {}
"""By the data's fingerprint: a run's evals count once."""


def pair_counts(data_dir: Path, manifest: Manifest) -> PairCounts | None:
    """How often each token follows which in the train split, within documents.

    A part of a large split is counted, the same each time: whole groups spread evenly over it, or
    the first sequences of groups that are larger than their share.

    Returns:
        PairCounts: None where no shard of the split can be read; those that cannot are left out,
            with a line on stderr.
    """
    key = manifest.fingerprint()
    if key not in _COUNTED:
        keys = [_pair_keys(group, manifest) for group in _groups(data_dir, manifest)]
        _COUNTED[key] = None
        if keys:
            joined = torch.from_numpy(np.concatenate(keys))
            _COUNTED[key] = PairCounts.from_keys(joined, manifest.tokenizer.vocab_size)
    return _COUNTED[key]


def _pair_keys(group: Sequence[PackedSequence], manifest: Manifest) -> NDArray[np.int64]:
    """`u · vocab_size + v` of each pair (u, v) that stands in a document of `group`."""
    found = []
    for packed in group:
        real = packed.real_tokens(manifest.tokenizer.pad_id)
        tokens = packed.tokens[:real].astype(np.int64)
        inside = np.ones(max(real - 1, 0), dtype=bool)
        last = np.cumsum(packed.document_lengths) - 1
        inside[last[last < len(inside)]] = False
        found.append((tokens[:-1] * manifest.tokenizer.vocab_size + tokens[1:])[inside])
    return np.concatenate(found)


def _groups(data_dir: Path, manifest: Manifest) -> Iterator[Sequence[PackedSequence]]:
    """The sequences that are counted, group by group."""
    shards = manifest.train.shards
    places = [
        (shard, number)
        for shard in _spread(len(shards), PAIR_SHARDS)
        for number in range(manifest.groups(shards[shard]))
    ]
    size = manifest.group_size * manifest.sequence_length
    chosen = [places[n] for n in _spread(len(places), max(PAIR_TOKENS // size, 1))]
    rows = max(PAIR_TOKENS // max(len(chosen), 1) // manifest.sequence_length, 1)
    index = manifest.shard_index(data_dir)
    for shard in dict.fromkeys(shard for shard, _ in chosen):
        try:
            reader = ShardReader(local_shard(data_dir, shards[shard]), index[shard])
            for number in (n for own, n in chosen if own == shard):
                yield reader.read_group(number)[:rows]
        except UserError as error:
            print(f"{error}; its token pairs are not counted", file=sys.stderr, flush=True)


def _spread(total: int, wanted: int) -> list[int]:
    """Up to `wanted` of the numbers `0 … total - 1`, as evenly as can be."""
    count = min(total, wanted)
    return [number * total // count for number in range(count)]
