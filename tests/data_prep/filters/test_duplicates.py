"""Groups of equal keys, against the obvious way and against datatrove's own steps."""

import struct

import numpy as np
import pytest

from data_prep.filters.config import DedupConfig
from data_prep.filters.duplicates import components, duplicates, equal_pairs


def groups_one_by_one(count, edges):
    """Each node's least neighbour, by relabelling at every edge."""
    labels = list(range(count))
    for a, b in edges:
        least, other = sorted((labels[a], labels[b]))
        labels = [least if label == other else label for label in labels]
    return labels


@pytest.mark.parametrize("seed", range(20))
def test_components_are_those_of_relabelling(seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 60))
    edges = rng.integers(0, count, size=(int(rng.integers(0, 60)), 2))
    found = components(count, edges[:, 0], edges[:, 1])
    assert found.tolist() == groups_one_by_one(count, edges.tolist())


def test_a_long_chain_is_one_component():
    chain = np.random.default_rng(0).permutation(5000)
    assert not components(5000, chain[:-1], chain[1:]).any()


def test_pairs_name_the_first_of_equals():
    keys = [np.array([7, 5, 7, 5, 9, 7], np.uint64), np.array([1, 1, 1, 1, 1, 2], np.uint64)]
    earlier, later = equal_pairs(keys, np.arange(10, 16))
    assert sorted(zip(earlier.tolist(), later.tolist(), strict=True)) == [(10, 12), (11, 13)]


def test_exact_copies_are_told_from_near_ones():
    # Columns: two halves of the text's hash, two buckets. Document 3 has no MinHash keys.
    keys = np.array([[1, 2, 1, 3, 3], [1, 2, 1, 3, 3], [8, 8, 8, 0, 0], [4, 5, 4, 0, 0]], np.uint64)
    signed = np.array([True, True, True, False, False])
    config = DedupConfig(exact=True, minhash=True, num_buckets=2)
    copies, exact = duplicates(config, [keys[:, :3], keys[:, 3:]], signed)
    assert copies.tolist() == [1, 2, 4]
    assert exact.tolist() == [False, True, True]


def near_copies(count=60, seed=0):
    """Texts of 120 words, a third of them earlier ones with some words changed."""
    rng = np.random.default_rng(seed)
    texts = []
    for number in range(count):
        words = [f"w{n}" for n in rng.integers(0, 500, 120)]
        if number % 3 == 2:
            words = texts[int(rng.integers(0, number))].split()
            for place in rng.integers(0, 120, int(rng.integers(0, 9))):
                words[place] = "changed"
        texts.append(" ".join(words))
    return [*texts, "too short", "too short"]


def test_the_groups_are_those_of_datatroves_own_steps(tmp_path):
    pytest.importorskip("datatrove")
    from datatrove.data import Document
    from datatrove.pipeline.dedup import minhash

    from data_prep.filters.duplicates import Signer, minhash_config
    from data_prep.filters.words import plain_words

    texts, tasks = near_copies(), 4
    config = DedupConfig(minhash=True)
    theirs = minhash_config(config)
    sign = minhash.MinhashDedupSignature(f"{tmp_path}/signatures", theirs, plain_words())
    for task in range(tasks):
        sign.run((Document(text=t, id="") for t in texts[task::tasks]), task, tasks)
    buckets = minhash.MinhashDedupBuckets(
        f"{tmp_path}/signatures", f"{tmp_path}/pairs", config=theirs
    )
    for bucket in range(theirs.num_buckets):
        buckets.run(None, bucket, theirs.num_buckets)
    minhash.MinhashDedupCluster(
        f"{tmp_path}/pairs", f"{tmp_path}/groups", config=theirs, save_cluster_id=True
    ).run(None, 0, 1)
    expected: dict[int, set[tuple[int, int]]] = {}
    for path in (tmp_path / "groups").glob("*.clusters"):
        for document, group in struct.iter_unpack("<2I", path.read_bytes()):
            expected.setdefault(group, set()).add((int(path.stem), document))

    signer = Signer(config)
    by_task = [[signer.keys(text) for text in texts[task::tasks]] for task in range(tasks)]
    keys = [np.array([own for own, _ in task]).T for task in by_task]
    signed = np.array([has for task in by_task for _, has in task])
    copies, exact = duplicates(config, keys, signed)
    places = [(task, number) for task in range(tasks) for number in range(len(by_task[task]))]
    firsts = {min(group) for group in expected.values()}
    assert {places[n] for n in copies} == set().union(*expected.values()) - firsts
    assert len(copies) > 10
    assert not exact.any()


def test_a_long_text_has_the_keys_of_its_shingles_at_once(monkeypatch):
    pytest.importorskip("datatrove")
    from data_prep.filters import duplicates

    text = " ".join(near_copies(6))
    whole = duplicates.Signer(DedupConfig(minhash=True)).keys(text)[0]
    monkeypatch.setattr(duplicates, "SHINGLES_TOGETHER", 50)
    parts = duplicates.Signer(DedupConfig(minhash=True)).keys(text)[0]
    assert whole.tolist() == parts.tolist()
