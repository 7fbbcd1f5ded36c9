"""Held-out prompts and sequences: from the right split, each once, the same for all ranks."""

import math
import shutil
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from evals_data import SEQUENCE_LENGTH, OneRank, make_sequence

from pipeline.data.mix import MixedSet
from pipeline.evals import heldout
from pipeline.evals.acceptance import PairCounts
from pipeline.evals.config import DecodeSpeedConfig
from pipeline.evals.heldout import HeldOut, Unigram, documents
from tidar_common.errors import UserError


def encoded(data, split: str) -> list[tuple[int, ...]]:
    tokenizer = data.tokenizer
    return [(*tokenizer.encode(text), tokenizer.eos_id) for text in data.texts[split]]


def pieces(ids: tuple[int, ...]) -> list[tuple[int, ...]]:
    """A document as packing cuts it."""
    return [ids[i : i + SEQUENCE_LENGTH] for i in range(0, len(ids), SEQUENCE_LENGTH)]


def test_prompts_begin_different_heldout_documents(data):
    heldout = [piece for ids in encoded(data, "heldout") for piece in pieces(ids)]
    train = [piece for ids in encoded(data, "train") for piece in pieces(ids)]
    prompts = [tuple(p) for p in data.heldout.prompts(1000, 10, seed=3)]
    long_enough = [piece[:10] for piece in heldout if len(piece) > 10]
    assert sorted(prompts) == sorted(long_enough)
    assert len(set(prompts)) == len(prompts) > 10
    assert not {piece[:10] for piece in train} & set(prompts)


def test_prompts_are_the_same_each_time_and_depend_on_the_seed(data):
    first = data.heldout.prompts(4, 5, seed=1)
    assert len(first) == 4
    assert first == data.heldout.prompts(4, 5, seed=1)
    assert data.heldout.prompts(6, 5, seed=1)[:4] == first
    assert any(data.heldout.prompts(4, 5, seed=s) != first for s in range(2, 6))


def test_prompts_longer_than_every_document_are_refused(data):
    with pytest.raises(UserError, match=r"prompt_tokens: no held-out document has more than 48"):
        data.heldout.prompts(4, SEQUENCE_LENGTH, seed=0)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("count", [3, 5, None, 10_000])
def test_shares_of_ranks_are_the_whole(data, count, shift):
    def share(rank: int, world_size: int):
        return list(
            data.heldout.sequences(count, 2, 4, shift=shift, rank=rank, world_size=world_size)
        )

    whole = share(0, 1)
    expected = data.manifest.heldout.sequences
    assert len(whole) == (expected if count in (None, 10_000) else count)
    assert len({sequence.tokens.tobytes() for sequence in whole}) == len(whole)
    divided = [share(rank, 3) for rank in range(3)]
    assert sum(map(len, divided)) == len(whole)
    for n, sequence in enumerate(whole):
        other = divided[n % 3][n // 3]
        assert np.array_equal(other.tokens, sequence.tokens)
        assert np.array_equal(other.layout.table(), sequence.layout.table())


def test_aligned_grids_cover_every_position_from_each_documents_start(data):
    for sequence in data.heldout.sequences(None, 0, 4, shift=False):
        ends = np.cumsum(sequence.real_lengths)
        starts = ends - sequence.real_lengths
        covered = sequence.layout.slot_position
        assert np.array_equal(covered, np.arange(int(ends[-1])))
        offset = sequence.layout.prefix_end - sequence.layout.prefix_start
        assert not (offset % 4).any()
        assert set(starts) <= set(sequence.layout.prefix_end)


def test_documents_leave_padding_out():
    sequence = make_sequence([3, 1, 2], 4, 2, 20, 0, shift=False)
    found = documents(sequence)
    assert [len(document) for document in found] == [3, 1, 2]
    assert np.array_equal(np.concatenate(found), sequence.tokens[:6])


def test_unigram_counts_the_training_split(data):
    counts = np.zeros(data.tokenizer.vocab_size)
    for ids in encoded(data, "train"):
        for token in ids:
            counts[token] += 1
    unigram = data.heldout.unigram()
    shares = [c / counts.sum() for c in counts if c]
    assert unigram.entropy == pytest.approx(-sum(p * math.log(p) for p in shares))
    np.testing.assert_allclose(unigram.probabilities, (counts + 1) / (counts + 1).sum())


def test_pairs_are_those_of_the_training_split_within_documents(data):
    vocabulary = data.tokenizer.vocab_size
    expected = np.zeros((vocabulary, vocabulary))
    for ids in encoded(data, "train"):
        for piece in pieces(ids):
            for one, other in pairwise(piece):
                expected[one, other] += 1
    assert np.array_equal(dense(heldout.pair_counts(data.folder, data.manifest)), expected)


def dense(counts: PairCounts) -> np.ndarray:
    size = len(counts.starts) - 1
    table = np.zeros((size, size))
    for token in range(size):
        for n in range(int(counts.starts[token]), int(counts.starts[token + 1])):
            assert table[token, counts.successors[n]] == 0
            table[token, counts.successors[n]] = counts.counts[n]
    return table


@pytest.mark.parametrize(("tokens", "groups"), [(4 * SEQUENCE_LENGTH * 3, 3), (60, 1)])
def test_of_a_large_split_a_part_is_counted_evenly(data, monkeypatch, tokens, groups):
    """Groups of four sequences; below one group, the beginning of one."""
    read, real = [], heldout.ShardReader.read_group

    def spy(reader, number):
        group = real(reader, number)
        read.append((reader.path.name, number, group))
        return group

    monkeypatch.setattr(heldout.ShardReader, "read_group", spy)
    monkeypatch.setattr(heldout, "PAIR_TOKENS", tokens)
    monkeypatch.setattr(heldout, "_COUNTED", {})
    counts = heldout.pair_counts(data.folder, data.manifest)
    assert len(read) == len({place[:2] for place in read}) == groups
    rows = [packed for *_, group in read for packed in group]
    wanted = rows if groups > 1 else rows[:1]
    real_pairs = 0
    for packed in wanted:
        last = packed.real_tokens(data.manifest.tokenizer.pad_id) == len(packed.tokens)
        lengths = packed.document_lengths if last else packed.document_lengths[:-1]
        real_pairs += int(lengths.sum()) - len(lengths)
    assert int(counts.counts.sum()) == real_pairs <= tokens
    again = heldout.pair_counts(data.folder, data.manifest)
    assert again is counts
    assert len(read) == groups


def test_shards_that_cannot_be_read_are_left_out(data, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "data"
    shutil.copytree(data.folder, folder)
    whole = int(heldout.pair_counts(data.folder, data.manifest).counts.sum())
    shards = data.manifest.train.shards
    assert len(shards) > 1
    monkeypatch.setattr(heldout, "_COUNTED", {})
    (folder / shards[0].name).write_bytes(b"")
    left = heldout.pair_counts(folder, data.manifest)
    assert 0 < int(left.counts.sum()) < whole
    assert "its token pairs are not counted" in capsys.readouterr().err
    monkeypatch.setattr(heldout, "_COUNTED", {})
    for shard in shards[1:]:
        (folder / shard.name).unlink()
    assert heldout.pair_counts(folder, data.manifest) is None
    assert HeldOut(folder, data.manifest).controls(OneRank()).names == ("unigram",)


def test_entropy_of_equal_frequencies():
    assert Unigram.from_counts(np.array([0, 5, 5, 5, 5])).entropy == pytest.approx(math.log(4))


def test_data_without_heldout_split_is_refused(data):
    empty = replace(data.manifest, heldout=replace(data.manifest.heldout, sequences=0))
    with pytest.raises(UserError, match="prepare it with a heldout_fraction"):
        HeldOut(data.folder, empty)


def test_a_held_out_shard_that_is_missing_is_named_at_once(data, tmp_path):
    folder = shutil.copytree(data.folder, tmp_path / "data")
    shard = folder / data.manifest.heldout.shards[0].name
    shard.unlink()
    with pytest.raises(UserError, match=f"^data.dir: {shard} is missing; "):
        HeldOut(folder, data.manifest)


def test_a_held_out_shard_of_a_mixed_set_is_named_with_its_key(data, tmp_path):
    folder = tmp_path / "code"
    shutil.copytree(data.folder, folder)
    (folder / data.manifest.heldout.shards[0].name).unlink()
    part = MixedSet("code", folder, data.manifest, ((0, 1.0),))
    with pytest.raises(UserError, match=r"^data\.mix\.code\.dir: .* is missing"):
        HeldOut(data.folder, data.manifest, [part])


def test_a_split_smaller_than_the_eval_asks_for_is_told_with_the_key(data):
    there = len(data.heldout.prompts(1000, 10, seed=0))
    total = data.manifest.heldout.sequences
    enough = DecodeSpeedConfig(prompts=there, prompt_tokens=10, score_sequences=total)
    assert data.heldout.shortages(enough) == []
    more = replace(enough, prompts=there + 1, score_sequences=total + 1)
    prompts, sequences = data.heldout.shortages(more)
    assert prompts.startswith(f"evals.decode_speed.prompts: {there + 1} asked for")
    assert f"only {there} held-out documents of more than 10 tokens" in prompts
    assert sequences.startswith(f"evals.decode_speed.score_sequences: {total + 1} asked for")
    assert f"only {total} held-out sequences" in sequences
