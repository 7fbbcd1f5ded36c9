"""Copies of documents: keys by which they are found, and groups of documents with equal keys.

A document has keys of its whole text and of its MinHash buckets. Those with an equal key in any
bucket are near copies: with b buckets of r hashes, texts that share a part s of their n-grams meet
with probability 1 - (1 - s^r)^b (Broder 1997). The first of each group is kept.

Keys are sorted, one column at a time: about 30 bytes of memory a document. datatrove's own step
merges one open file for each task and bucket, a record at a time, in Python; the groups are the
same, as a test shows.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data_prep.filters.config import DedupConfig

Numbers = NDArray[np.int64]
EXACT, MINHASH = "duplicate: exact", "duplicate: minhash"
EXACT_COLUMNS = 2
"""64-bit halves of a text's hash: one alone would meet by chance among a billion documents."""
SHINGLES_TOGETHER = 8192
"""More of a long text take memory in proportion, and give the same minimum."""


class Signer:
    """Makes the keys of one document; shingles and hashes are datatrove's."""

    def __init__(self, config: DedupConfig) -> None:
        self.config = config
        self.columns = EXACT_COLUMNS * config.exact + config.num_buckets * config.minhash
        self._minhash = _minhash_step(config) if config.minhash else None

    def keys(self, text: str) -> tuple[NDArray[np.uint64], bool]:
        """uint64 [columns], and whether there are MinHash keys: not of a text of too few words."""
        keys = np.zeros(self.columns, dtype=np.uint64)
        first = EXACT_COLUMNS * self.config.exact
        if first:
            digest = hashlib.sha256(text.encode()).digest()
            keys[:first] = np.frombuffer(digest, dtype=np.uint64)[:first]
        buckets = self._buckets(text) if self._minhash is not None else None
        if buckets is None:
            return keys, False
        for number, bucket in enumerate(buckets, first):
            digest = hashlib.blake2b(bucket.tobytes(), digest_size=8).digest()
            keys[number] = int.from_bytes(digest, "little")
        return keys, True

    def _buckets(self, text: str) -> NDArray[np.uint64] | None:
        """[buckets, hashes]; None for a text without n-grams."""
        assert self._minhash is not None, "only called where it is set"
        shingles = self._minhash.get_shingles(text)
        if not len(shingles):
            return None
        spans = range(0, len(shingles), SHINGLES_TOGETHER)
        parts = (
            self._minhash.get_signature(shingles[start : start + SHINGLES_TOGETHER])
            for start in spans
        )
        return np.min([np.array(part, dtype=np.uint64) for part in parts], axis=0)


def _minhash_step(config: DedupConfig):  # type: ignore[no-untyped-def]
    from datatrove.pipeline.dedup.minhash import MinhashDedupSignature

    from data_prep.filters.words import plain_words

    # The folder is where its `run` would write; only its methods on one text are used here.
    return MinhashDedupSignature(
        "memory://signatures", config=minhash_config(config), language=plain_words()
    )


def minhash_config(config: DedupConfig):  # type: ignore[no-untyped-def]
    """datatrove's form of the keys. SHA-1, for its xxhash functions fail with xxhash 4."""
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.utils.hashing import HashConfig

    return MinhashConfig(
        n_grams=config.n_grams,
        num_buckets=config.num_buckets,
        hashes_per_bucket=config.hashes_per_bucket,
        hash_config=HashConfig(precision=64, hash_fc="sha1"),
    )


def duplicates(
    config: DedupConfig, keys: Sequence[NDArray[np.uint64]], signed: NDArray[np.bool_]
) -> tuple[Numbers, NDArray[np.bool_]]:
    """Which documents are copies of an earlier one.

    Args:
        config: what is looked for.
        keys: of each task [columns, documents], in order.
        signed: [all documents]: those with MinHash keys.

    Returns:
        tuple: numbers of the copies among all documents, ascending; and whether each is an exact
            copy of an earlier document.
    """
    exact = np.zeros(len(signed), dtype=bool)
    pairs: list[tuple[Numbers, Numbers]] = []
    first = EXACT_COLUMNS * config.exact
    if config.exact:
        halves = [_column(keys, number) for number in range(EXACT_COLUMNS)]
        pairs.append(equal_pairs(halves, np.arange(len(signed))))
        exact[pairs[0][1]] = True
    if config.minhash:
        some = np.flatnonzero(signed)
        buckets = range(first, first + config.num_buckets)
        pairs += [equal_pairs([_column(keys, number)[some]], some) for number in buckets]
    earlier, later = (np.concatenate([pair[side] for pair in pairs]) for side in (0, 1))
    nodes, places = np.unique(np.concatenate([earlier, later]), return_inverse=True)
    labels = components(len(nodes), places[: len(earlier)], places[len(earlier) :])
    copies = nodes[labels != np.arange(len(nodes))]
    return copies, exact[copies]


def equal_pairs(keys: Sequence[NDArray[np.uint64]], numbers: Numbers) -> tuple[Numbers, Numbers]:
    """Of documents with equal keys: the first of them, and each of the others."""
    order = np.lexsort(keys)  # stable: among equals in the order of their numbers
    new = np.ones(len(order), dtype=bool)
    if len(order) > 1:
        new[1:] = np.any([key[order[1:]] != key[order[:-1]] for key in keys], axis=0)
    starts = np.flatnonzero(new)
    heads = order[np.repeat(starts, np.diff(np.append(starts, len(order))))]
    return numbers[heads[~new]], numbers[order[~new]]


def components(count: int, left: Numbers, right: Numbers) -> Numbers:
    """The least number that each of `count` nodes is connected with, by the edges between."""
    labels = np.arange(count)
    while True:
        least = np.minimum(labels[left], labels[right])
        lower = labels.copy()
        np.minimum.at(lower, labels[left], least)
        np.minimum.at(lower, labels[right], least)
        lower = lower[lower]
        if np.array_equal(lower, labels):
            return labels
        labels = lower


def _column(keys: Sequence[NDArray[np.uint64]], number: int) -> NDArray[np.uint64]:
    return np.concatenate([of_task[number] for of_task in keys])
