"""One split: layouts are those of each sequence alone, everything is counted, the seed decides."""

import json

import numpy as np
import pytest
from omegaconf import OmegaConf

from data_prep.config import PrepareSettings
from data_prep.formats.manifest import SPLITS
from data_prep.formats.shards import read_shard
from data_prep.layout import Layout, build_layout
from data_prep.stages.pack import Piece
from data_prep.stages.write import SplitWriter, stored_layouts

CONFIG = {
    "corpus": {"kind": "python_stdlib"},
    "filters": {},
    "dedup": {},
    "decontaminate": {},
    "tokenizer": {"kind": "sentencepiece"},
    "layout": {"block_size": 8, "coverage": 1.0, "shift": False},
    "sequence_length": 64,
    "heldout_fraction": 0.1,
    "packing": "best_fit",
    "shard_bytes": 1_000_000,
    "shard_sequences": 7,
    "group_size": 3,
    "task_bytes": None,
    "workers": 1,
    "array": None,
    "seed": 3,
    "verify": False,
    "stats": False,
    "inspect": None,
    "overwrite": False,
}


def settings(folder, **changes):
    cfg = OmegaConf.create(json.loads(json.dumps(CONFIG)))
    for key, value in {"output_dir": str(folder), **changes}.items():
        OmegaConf.update(cfg, key, value, force_add=True)
    return PrepareSettings.from_config(cfg)


def documents(tokenizer, lengths, seed=0):
    """Random ids, each document with its end token."""
    rng = np.random.default_rng(seed)
    low, high = tokenizer.vocab_size - 200, tokenizer.vocab_size
    return [np.append(rng.integers(low, high, n), tokenizer.eos_id) for n in lengths]


def fill(folder, tokenizer, lengths, task=0, keep_rests=False, **changes):
    writer = SplitWriter(settings(folder, **changes), "train", tokenizer, task)
    for ids in documents(tokenizer, lengths):
        writer.add(Piece(ids))
    written, rests = writer.finish(folder, "x-", keep_rests=keep_rests)
    return writer, written, rests


def stored(folder, written):
    return [sequence for shard in written.shards for sequence in read_shard(folder / shard.name)]


def pieces_of(sequence, pad_id):
    real = sequence.real_tokens(pad_id)
    ends = np.cumsum(sequence.document_lengths)
    return [piece.tolist() for piece in np.split(sequence.tokens[:real], ends[ends < real])]


def as_packed(lengths):
    """Sequences of documents of these lengths, without tokens."""
    return [[Piece(np.zeros(n, dtype=np.uint16)) for n in own] for own in lengths]


def layouts_of(own, key, packed):
    """The layout of each sequence, out of the tables of all."""
    tables, rows = stored_layouts(own, key, packed)
    assert tables.dtype == np.int32
    assert rows.sum() == len(tables)
    return [Layout.from_table(table) for table in np.split(tables, np.cumsum(rows)[:-1])]


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
        layouts = layouts_of(own, (SPLITS.index(split), 6, 100), as_packed(packed))
        for number, (layout, one) in enumerate(zip(layouts, packed, strict=True)):
            stream = np.random.default_rng([3, SPLITS.index(split), 6, 100 + number])
            alone = build_layout(
                one, own.layout.block_size, coverage=own.layout.coverage, shift=own.layout.shift,
                rng=stream,
            )  # fmt: skip
            assert np.array_equal(layout.table(), alone.table())


@pytest.mark.parametrize("packing", ["best_fit", "concatenate"])
def test_every_document_comes_out_with_its_end_token(tmp_path, tokenizer, lengths, packing):
    """Shards and rests together hold every piece, and tell those that go on from a cut."""
    _, written, rests = fill(tmp_path, tokenizer, lengths, keep_rests=True, packing=packing)
    whole, begun = [], 0
    for sequence in stored(tmp_path, written):
        pieces = pieces_of(sequence, tokenizer.pad_id)
        whole += pieces
        begun += len(pieces) - int(sequence.continued.sum())
    whole += [piece.ids.tolist() for piece in rests]
    begun += sum(not piece.continued for piece in rests)
    assert rests
    assert begun == len(lengths)
    made = documents(tokenizer, lengths)
    assert sum(map(len, whole)) == sum(map(len, made))
    if packing == "best_fit":
        cut = [ids[start : start + 64].tolist() for ids in made for start in range(0, len(ids), 64)]
        assert sorted(whole) == sorted(cut)


def test_totals_add_up(tmp_path, tokenizer, lengths):
    writer, written, rests = fill(tmp_path, tokenizer, lengths)
    assert rests == []
    sequences = sum(shard.sequences for shard in written.shards)
    tokens = sum(shard.tokens for shard in written.shards)
    assert tokens == sum(lengths) + len(lengths)
    assert sequences * 64 == tokens + sum(shard.padding for shard in written.shards)
    assert written.cut_documents == sum(n + 1 > 64 for n in lengths)
    assert written.cuts == sum(-(-(n + 1) // 64) - 1 for n in lengths)
    assert [shard.name for shard in written.shards[:2]] == ["x-000.tar", "x-001.tar"]
    assert all(shard.sequences == 7 for shard in written.shards[:-1])
    ids = np.concatenate(documents(tokenizer, lengths))
    assert np.array_equal(writer.token_counts, np.bincount(ids, minlength=tokenizer.vocab_size))


def test_shards_have_about_the_size_that_is_asked(tmp_path, tokenizer, lengths):
    """Evenly, in whole groups: no last shard with a sequence or two."""
    many = lengths * 6
    _, written, _ = fill(tmp_path, tokenizer, many, shard_sequences=None, shard_bytes=20_000)
    sizes = [shard.sequences for shard in written.shards]
    assert len(sizes) > 3
    assert all(size % 3 == 0 for size in sizes[:-1])
    assert max(sizes) - min(sizes) <= 6
    one = fill(tmp_path / "one", tokenizer, many, shard_sequences=None)[1]
    assert [shard.sequences for shard in one.shards] == [sum(sizes)]


def test_sequences_are_shuffled_by_seed_and_task(tmp_path, tokenizer, lengths):
    def order(name, **changes):
        written = fill(tmp_path / name, tokenizer, lengths, **changes)[1]
        return [sequence.tokens.tobytes() for sequence in stored(tmp_path / name, written)]

    first, again = order("a"), order("b")
    others = [order("c", seed=4), order("d", task=1)]
    assert first == again
    for other in others:
        assert first != other
        assert sorted(first) == sorted(other)


@pytest.mark.parametrize("extra", [{}, {"layout.coverage": 0.5, "layout.shift": True}])
def test_block_sizes_are_drawn_with_their_shares(tmp_path, extra):
    own = settings(
        tmp_path, **{"layout.block_sizes": [2, 8], "layout.block_shares": [3, 1], **extra}
    )
    layouts = layouts_of(own, (0, 0, 0), as_packed([[64]] * 400))
    longest = [int(layout.draft_lengths.max()) for layout in layouts]
    assert set(longest) == {2, 8}
    assert 0.68 < longest.count(2) / 400 < 0.82
    again = layouts_of(own, (0, 0, 200), as_packed([[64]] * 200))
    assert [one.table().tolist() for one in again] == [
        one.table().tolist() for one in layouts[200:]
    ]
    if not extra:
        assert all(layout.num_slots == 64 for layout in layouts)
