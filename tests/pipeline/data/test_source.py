"""Sequences out of real shards, and the loader that reads them ahead."""

import argparse
import dataclasses
import json
import pydoc
import shutil
import textwrap
import threading
import time

import numpy as np
import pytest
import torch
from commands import run, train_small

from data_prep.formats.manifest import Manifest
from data_prep.formats.shards import read_shard
from pipeline.data.batch import Share, ahead, make_batch, sequence_digest, step_batches
from pipeline.data.place import ORIGIN, DataConfig, check_shards
from pipeline.data.source import LayoutChoice, SequenceSource
from tidar_common.errors import UserError


@pytest.fixture(scope="module")
def manifest(data_dir) -> Manifest:
    return Manifest.load(data_dir)


def make_source(data_dir, manifest, choice=None, seed=0) -> SequenceSource:
    return SequenceSource(data_dir, manifest, manifest.train, seed, choice)


def test_an_epoch_is_every_stored_sequence_once(data_dir, manifest):
    source = make_source(data_dir, manifest)
    stored = [
        (sequence.tokens.tobytes(), sequence.document_lengths.tolist(), sequence.layout.table())
        for shard in manifest.train.shards
        for sequence in read_shard(data_dir / shard.name)
    ]
    assert source.order.epoch_sequences == len(stored) == manifest.train.sequences
    assert len(manifest.train.shards) > 1
    read = [source[n] for n in range(len(stored))]
    found = [(s.tokens.tobytes(), s.document_lengths.tolist(), s.layout.table()) for s in read]
    as_text = [sorted(map(repr, rows)) for rows in (found, stored)]
    assert as_text[0] == as_text[1]
    assert [row[0] for row in found] != [row[0] for row in stored]
    assert sum(s.padding for s in read) == manifest.train.padding
    assert sum(int(s.real_lengths.sum()) for s in read) == manifest.train.tokens


def test_padding_is_told_apart_and_carries_no_block(data_dir, manifest):
    source = make_source(data_dir, manifest, LayoutChoice(block_size=5, shift=True))
    padded = [s for s in map(source.__getitem__, range(manifest.train.sequences)) if s.padding]
    assert padded
    for sequence in padded:
        real = len(sequence.tokens) - sequence.padding
        assert set(sequence.tokens[real:].tolist()) == {manifest.tokenizer.pad_id}
        assert manifest.tokenizer.pad_id not in sequence.tokens[:real]
        assert sequence.layout.draft_end.max() == real


def test_new_layouts_differ_between_epochs_and_repeat_exactly(data_dir, manifest):
    choice = LayoutChoice(block_size=6, coverage=0.5, shift=True)
    source, again = (make_source(data_dir, manifest, choice) for _ in range(2))
    epoch = source.order.epoch_sequences
    by_tokens = [{}, {}]
    for n in range(2 * epoch):
        sequence = source[n]
        assert np.array_equal(sequence.layout.table(), again[n].layout.table())
        by_tokens[n // epoch][sequence.tokens.tobytes()] = sequence
    changed = 0
    for key, first in by_tokens[0].items():
        second = by_tokens[1][key]
        drafted = int(first.layout.num_slots)
        assert drafted <= 0.5 * int(first.real_lengths.sum()) or first.layout.num_blocks == 1
        assert first.layout.draft_lengths.max() <= 6
        changed += not np.array_equal(first.layout.table(), second.layout.table())
    assert changed > 0.9 * epoch


def test_block_sizes_are_drawn_for_every_sequence(data_dir, manifest):
    choice = LayoutChoice(block_size=8, block_sizes=[2, 8], block_shares=[3, 1])
    source, again = (make_source(data_dir, manifest, choice) for _ in range(2))
    longest = [int(source[n].layout.draft_lengths.max()) for n in range(200)]
    assert set(longest) == {2, 8}
    assert longest.count(2) > longest.count(8)
    assert longest == [int(again[n].layout.draft_lengths.max()) for n in range(200)]
    with pytest.raises(UserError, match=r"layout\.block_sizes: 9 is above layout\.block_size 4"):
        make_source(data_dir, manifest, LayoutChoice(block_sizes=[4, 9]))


def test_prompts_of_the_data_are_left_out_or_learnt(tmp_path):
    """As prepared, and laid out anew with and without them; other data has none to leave out."""
    words = pydoc.__doc__.split() + textwrap.__doc__.split() + argparse.__doc__.split()
    rows = [
        {"ask": " ".join(words[n : n + 5]), "text": " ".join(words[n + 5 : n + 7 + n % 30])}
        for n in range(500)
    ]
    text = tmp_path / "pairs.jsonl"
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "data"
    done = run(
        "data_prep.prepare", f"output_dir={folder}", "corpus=jsonl", f"corpus.path={text}",
        "corpus.prompt_field=ask", "layout.loss_span=response", "sequence_length=64",
        "tokenizer.vocab_size=340", "layout.block_size=4", "heldout_fraction=0.2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    manifest = Manifest.load(folder)
    stored = make_source(folder, manifest)
    anew = make_source(folder, manifest, LayoutChoice(shift=True, coverage=0.5))
    whole = make_source(folder, manifest, LayoutChoice(loss_span="document"))
    found = 0
    for n in range(manifest.train.sequences):
        prompts = int(stored[n].real_prompts.sum())
        real = int(stored[n].real_lengths.sum())
        found += prompts
        assert stored[n].layout.num_slots == real - prompts
        assert anew[n].layout.num_slots <= 0.5 * (real - prompts) or anew[n].layout.num_blocks == 1
        starts = np.cumsum(stored[n].real_lengths) - stored[n].real_lengths
        behind = dict(zip(starts.tolist(), stored[n].real_prompts.tolist(), strict=True))
        for first, start in zip(
            anew[n].layout.prefix_end, anew[n].layout.prefix_start, strict=True
        ):
            assert first - start >= behind[int(start)]
        assert whole[n].layout.num_slots == real
        assert whole[n].prompt_lengths is None
    assert found > 0
    run_dir = tmp_path / "run"
    done = train_small(folder, run_dir, "steps=2", "evals.decode_speed.prompt_tokens=4")
    assert done.returncode == 0, done.stderr
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < last["loss_ar"] < 10
    assert 0 < last["loss_diffusion"] < 10


def test_data_without_prompts_has_none_to_leave_out(data_dir, manifest):
    with pytest.raises(UserError, match=r"^layout\.loss_span: .* was prepared without prompts"):
        make_source(data_dir, manifest, LayoutChoice(loss_span="response"))


def test_a_missing_shard_is_named(data_dir, manifest, tmp_path):
    shutil.copy(data_dir / "shard_index.npy", tmp_path)
    source = make_source(tmp_path, manifest)
    with pytest.raises(UserError, match=r"train/00000\d\.tar: missing or damaged shard"):
        source[0]


def test_shards_that_are_not_there_are_named_before_they_are_reached(data_dir, manifest, tmp_path):
    folder = shutil.copytree(data_dir, tmp_path / "data")
    train = manifest.train.shards
    assert check_shards(folder, train, "data.dir") is None
    last = folder / train[-1].name
    last.unlink()
    said = f"data.mix.code.dir: {last} is missing"
    for skip, remedy in ((None, "run tidar-prepare again$"), (False, "data.skip_damaged=true")):
        with pytest.raises(UserError, match=f"^{said}; .*{remedy}"):
            check_shards(folder, train, "data.mix.code.dir", skip_damaged=skip)
    warning = check_shards(folder, train, "data.mix.code.dir", skip_damaged=True)
    assert warning == f"{said}; left out, as data.skip_damaged says"
    (folder / train[0].name).write_bytes(b"?")
    with pytest.raises(UserError, match=rf"has 1 bytes.* \(and 1 more of {len(train)} shards\)"):
        check_shards(folder, train, "data.dir")
    (folder / ORIGIN).touch()  # the folder stands for a URL: shards come when they are needed
    assert check_shards(folder, train, "data.dir") is None


def test_a_damaged_shard_is_left_out_on_request(data_dir, manifest, tmp_path, capsys):
    """What stands elsewhere comes in the same order; in its place comes padding."""
    folder = shutil.copytree(data_dir, tmp_path / "data")
    damaged = manifest.train.shards[0]
    (folder / damaged.name).write_bytes(b"?" * 1000)
    with pytest.raises(UserError, match=damaged.name):
        [make_source(folder, manifest)[n] for n in range(manifest.train.sequences)]
    whole = make_source(data_dir, manifest)
    source = SequenceSource(
        folder, manifest, manifest.train, 0, None, DataConfig(skip_damaged=True)
    )
    left_out = 0
    for n in range(manifest.train.sequences):
        sequence = source[n]
        if whole.order[n].shard == 0:
            left_out += 1
            assert sequence.padding == len(sequence.tokens)
            batch = make_batch([sequence], manifest.tokenizer.mask_id, 64)
            assert len(batch.labels) == batch.clean_tokens == 0
        else:
            assert sequence_digest(sequence) == sequence_digest(whole[n])
    assert left_out == damaged.sequences
    (found,) = source.damaged_shards()
    first = next(n for n in range(manifest.train.sequences) if whole.order[n].shard == 0)
    assert (found.set, found.shard, found.step) == (None, damaged.name, first + 1)
    assert damaged.name in found.reason
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.endswith("its sequences are left out\n")


def test_ten_thousand_shards_are_no_wait(data_dir, manifest, tmp_path):
    """The first sequence after a start in the middle of a run, of a data set 10,000 shards long."""
    shards = manifest.train.shards[:2] * 5000
    many = dataclasses.replace(
        manifest.train, shards=shards, sequences=sum(one.sequences for one in shards)
    )
    large = dataclasses.replace(manifest, train=many)
    own = manifest.shard_index(data_dir)[:2]
    heldout = manifest.shard_index(data_dir)[len(manifest.train.shards) :]
    for shard in manifest.train.shards[:2]:
        (tmp_path / shard.name).parent.mkdir(exist_ok=True)
        shutil.copy(data_dir / shard.name, tmp_path / shard.name)
    np.save(tmp_path / "shard_index.npy", np.concatenate([*own * 5000, *heldout]))
    large.save(tmp_path)
    started = time.process_time()
    loaded = Manifest.load(tmp_path)
    source = SequenceSource(tmp_path, loaded, loaded.train, seed=0)
    sequence = source[3 * many.sequences + 12_345]
    assert time.process_time() - started < 1
    assert len(sequence.tokens) == manifest.sequence_length


@pytest.mark.parametrize("values", [{"block_size": 0}, {"coverage": 0.0}, {"coverage": 1.1}])
def test_bad_layouts_are_refused(values):
    with pytest.raises(UserError, match=f"layout.{next(iter(values))}"):
        LayoutChoice(**values)


def test_batches_are_those_of_the_order_from_any_start(data_dir, manifest):
    source, share = make_source(data_dir, manifest), Share(2, 2, rank=1, world_size=2)
    straight = step_batches(source, share, 0, with_slots=True)
    steps = [next(straight) for _ in range(4)]
    later = next(step_batches(make_source(data_dir, manifest), share, 3 * 8, with_slots=True))
    for step, batches in enumerate(steps):
        numbers = share.numbers(8 * step)
        for batch, own in zip(batches, numbers, strict=True):
            expected = make_batch([source[n] for n in own], manifest.tokenizer.mask_id, 64)
            assert torch.equal(batch.input_ids, expected.input_ids)
            assert torch.equal(batch.labels, expected.labels)
            assert batch.digests == b"".join(sequence_digest(source[n]) for n in own)
    assert [b.digests for b in later] == [b.digests for b in steps[3]]
    straight.close()


def test_no_mask_section_for_the_twin(data_dir, manifest):
    batches = step_batches(make_source(data_dir, manifest), Share(2, 1, 0, 1), 0, with_slots=False)
    batch = next(batches)[0]
    assert batch.input_ids.shape == (2, 64)
    assert batch.diffusion_labels == 0
    batches.close()


def test_what_goes_wrong_ahead_is_raised_in_turn():
    def broken():
        yield ["first"]
        raise UserError("shard: damaged")

    batches = ahead(broken(), 2)
    assert next(batches) == ["first"]
    with pytest.raises(UserError, match="shard: damaged"):
        next(batches)


def test_the_thread_ends_with_its_reader():
    def endless():
        while True:
            yield ["batch"]

    batches = ahead(endless(), 2)
    next(batches)
    thread = next(t for t in threading.enumerate() if t.name == "tidar-read-ahead")
    batches.close()
    assert not thread.is_alive()
