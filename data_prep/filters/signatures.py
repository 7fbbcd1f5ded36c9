"""Keys by which copies of a document are found: of its whole text, and of its MinHash buckets.

Documents with an equal key in any bucket are near copies: with b buckets of r hashes, texts that
share a part s of their n-grams meet with probability 1 - (1 - s^r)^b (Broder 1997).
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

from data_prep.filters.config import DedupConfig

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
        found = np.zeros(self.columns, dtype=np.uint64)
        first = EXACT_COLUMNS * self.config.exact
        if first:
            digest = hashlib.sha256(text.encode()).digest()
            found[:first] = np.frombuffer(digest, dtype=np.uint64)[:first]
        buckets = self._buckets(text) if self._minhash is not None else None
        if buckets is None:
            return found, False
        for number, own in enumerate(buckets, first):
            digest = hashlib.blake2b(own.tobytes(), digest_size=8).digest()
            found[number] = int.from_bytes(digest, "little")
        return found, True

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
