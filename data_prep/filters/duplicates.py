"""Groups of documents with equal keys; the first of each group is kept.

Keys are sorted, one column at a time: about 30 bytes of memory a document. datatrove's own step
merges one open file for each task and bucket, a record at a time, in Python; the groups are the
same, as a test shows.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data_prep.filters.config import DedupConfig
from data_prep.filters.signatures import EXACT_COLUMNS

Numbers = NDArray[np.int64]
EXACT, MINHASH = "duplicate: exact", "duplicate: minhash"


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
        found = labels.copy()
        np.minimum.at(found, labels[left], least)
        np.minimum.at(found, labels[right], least)
        found = found[found]
        if np.array_equal(found, labels):
            return labels
        labels = found


def _column(keys: Sequence[NDArray[np.uint64]], number: int) -> NDArray[np.uint64]:
    return np.concatenate([own[number] for own in keys])
