"""One split: layouts are those of each sequence alone, everything is counted, the seed decides."""

import json

import numpy as np
import pytest
from omegaconf import OmegaConf

from data_prep.encoding import Encoded
from data_prep.layout import build_layout
from data_prep.manifest import SPLITS
from data_prep.settings import PrepareSettings
from data_prep.shards import read_shard
from data_prep.split_writer import SplitWriter, stored_layouts

CONFIG = {
    "corpus": {"kind": "python_stdlib"},
    "tokenizer": {"kind": "sentencepiece"},
    "layout": {"block_size": 8, "coverage": 1.0, "shift": False},
    "sequence_length": 64,
    "heldout_fraction": 0.1,
    "shard_sequences": 7,
    "group_size": 3,
    "shuffle_sequences": 10,
    "workers": 1,
    "seed": 3,
    "verify": False,
    "overwrite": False,
}


def settings(folder, **changes):
    cfg = OmegaConf.create(json.loads(json.dumps(CONFIG)))
    for key, value in {"output_dir": str(folder), **changes}.items():
        OmegaConf.update(cfg, key, value, force_add=True)
    return PrepareSettings.from_config(cfg)


def documents(tokenizer, lengths, seed=0):
    rng = np.random.default_rng(seed)
    low, high = tokenizer.vocab_size - 200, tokenizer.vocab_size
    return [
        Encoded(f"d{number}", rng.integers(low, high, n).astype(np.int32), 2 * n)
        for number, n in enumerate(lengths)
    ]


def fill(folder, tokenizer, lengths, **changes):
    writer = SplitWriter(settings(folder, **changes), "train", tokenizer)
    for document in documents(tokenizer, lengths):
        writer.add(document)
    return writer, writer.finish()


@pytest.fixture(scope="module")
def lengths():
    return np.random.default_rng(0).integers(1, 150, size=60).tolist()


@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"layout.shift": True},
        {"layout.coverage": 0.4},
        {"layout.coverage": 0.4, "layout.shift": True},
        {"layout.block_size": 1},
        {"layout.block_size": 100},
    ],
)
def test_layouts_of_a_shard_are_those_of_each_sequence_alone(tmp_path, choice):
    """Full coverage is laid out in one go and must not differ; the rest is keyed by sequence."""
    own = settings(tmp_path, **choice)
    rng = np.random.default_rng(5)
    packed = [rng.integers(1, 30, size=rng.integers(1, 6)).tolist() for _ in range(50)]
    for split in SPLITS:
        layouts = stored_layouts(own, split, 100, packed)
        for number, (layout, one) in enumerate(zip(layouts, packed, strict=True)):
            stream = np.random.default_rng([3, SPLITS.index(split), 100 + number])
            alone = build_layout(
                one, own.layout.block_size, coverage=own.layout.coverage, shift=own.layout.shift,
                rng=stream,
            )  # fmt: skip
            assert np.array_equal(layout.table(), alone.table())
            assert layout.table().dtype == np.int32


def test_every_document_comes_out_with_its_end_token(tmp_path, tokenizer, lengths):
    _, split = fill(tmp_path, tokenizer, lengths)
    pieces = []
    for shard in split.shards:
        for sequence in read_shard(tmp_path / shard.name):
            real = sequence.real_tokens(tokenizer.pad_id)
            ends = np.cumsum(sequence.document_lengths)
            cuts = ends[ends < real]
            pieces += [piece.tolist() for piece in np.split(sequence.tokens[:real], cuts)]
    expected = []
    for document in documents(tokenizer, lengths):
        whole = [*document.ids.tolist(), tokenizer.eos_id]
        expected += [whole[start : start + 64] for start in range(0, len(whole), 64)]
    assert sorted(pieces) == sorted(expected)


def test_totals_add_up(tmp_path, tokenizer, lengths):
    writer, split = fill(tmp_path, tokenizer, lengths)
    assert split.documents == len(lengths)
    assert split.text_bytes == 2 * sum(lengths)
    assert split.tokens == sum(lengths) + len(lengths)
    assert split.sequences * 64 == split.tokens + split.padding
    assert split.cut_documents == sum(n + 1 > 64 for n in lengths)
    assert split.cuts == sum(-(-(n + 1) // 64) - 1 for n in lengths)
    assert [shard.name for shard in split.shards[:2]] == ["train/000000.tar", "train/000001.tar"]
    assert all(shard.sequences == 7 for shard in split.shards[:-1])
    assert sum(shard.sequences for shard in split.shards) == split.sequences
    ids = np.concatenate([document.ids for document in documents(tokenizer, lengths)])
    expected = np.bincount(ids, minlength=tokenizer.vocab_size)
    expected[tokenizer.eos_id] += len(lengths)
    assert np.array_equal(writer.token_counts, expected)


def test_sequences_are_shuffled_by_the_seed(tmp_path, tokenizer, lengths):
    def order(name, **changes):
        _, split = fill(tmp_path / name, tokenizer, lengths, **changes)
        return [
            sequence.tokens.tobytes()
            for shard in split.shards
            for sequence in read_shard(tmp_path / name / shard.name)
        ]

    first, again, other = order("a"), order("b"), order("c", seed=4)
    assert first == again
    assert first != other
    assert sorted(first) == sorted(other)
    unshuffled = order("d", shuffle_sequences=1)
    assert unshuffled != first
    assert sorted(unshuffled) == sorted(first)
