"""`verify=true` finds every kind of damage, and says in which file."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from packed_groups import groups_of

from data_prep.formats.manifest import MANIFEST, Manifest
from data_prep.formats.shards import read_shard, write_shard
from data_prep.inspect.verify import verify_data
from data_prep.layout import Layout
from data_prep.tokenizers.train import train_sentencepiece
from tidar_common.errors import UserError
from tidar_common.files import sha256_of

SHARD = "train/000001.tar"


@pytest.fixture
def folder(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "data")


def test_an_undamaged_folder_passes(folder):
    assert "sequences are as the manifest says" in verify_data(folder)


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-600])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def swap_shards(path):
    other = path.with_name("000002.tar")
    first, second = path.read_bytes(), other.read_bytes()
    path.write_bytes(second)
    other.write_bytes(first)


FILE_DAMAGE = {
    "shard missing": (SHARD, lambda path: path.unlink(), "is missing"),
    "shard truncated": (SHARD, cut_off, "differs from what manifest.json says"),
    "shard with a flipped bit": (SHARD, flip, "differs from what manifest.json says"),
    "shards swapped": (SHARD, swap_shards, "differs from what manifest.json says"),
    "heldout shard with a flipped bit": ("heldout/000000.tar", flip, "differs from what"),
    "shard too many": (
        "train/000999.tar",
        lambda path: shutil.copy(path.with_name("000000.tar"), path),
        "is not in manifest.json",
    ),
    "tokenizer missing": ("tokenizer.model", lambda path: path.unlink(), "is missing"),
    "tokenizer changed": ("tokenizer.model", flip, "differs from what manifest.json says"),
    "counts missing": ("token_counts.npy", lambda path: path.unlink(), "is missing"),
    "counts changed": ("token_counts.npy", flip, "differs from what manifest.json says"),
    "index missing": ("shard_index.npy", lambda path: path.unlink(), "is missing"),
    "index changed": ("shard_index.npy", flip, "differs from what manifest.json says"),
    "manifest missing": (MANIFEST, lambda path: path.unlink(), "not found"),
    "manifest truncated": (MANIFEST, cut_off, "damaged"),
    "manifest not an object": (MANIFEST, lambda path: path.write_text("[]"), "damaged"),
    "manifest of another version": (
        MANIFEST,
        lambda path: path.write_text(json.dumps({"format_version": 99})),
        "format version 99",
    ),
}


@pytest.mark.parametrize("kind", FILE_DAMAGE)
def test_a_damaged_file_is_named(folder, kind):
    name, damage, text = FILE_DAMAGE[kind]
    damage(folder / name)
    with pytest.raises(UserError, match=text) as caught:
        verify_data(folder)
    assert str(caught.value).startswith(f"{folder / name}: ")


@pytest.mark.parametrize(
    "keys",
    [
        ("train", "tokens"),
        ("train", "text_bytes"),
        ("heldout", "documents"),
        ("documents", "read"),
        ("block_size",),
        ("config", "seed"),
        ("tokenizer", "mask_id"),
    ],
)
def test_an_edited_manifest_is_noticed(folder, keys):
    values = json.loads((folder / MANIFEST).read_text())
    place = values
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] += 1
    (folder / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"manifest\.json: damaged .*its own checksum"):
        Manifest.load(folder)


def rewritten(folder, change):
    """Change the sequences of a shard and record the shard as if it were meant to be so."""
    manifest = Manifest.load(folder)
    shards = list(manifest.train.shards)
    old = shards[1]
    sequences = change(list(read_shard(folder / SHARD)), manifest)
    info, _ = write_shard(
        folder / SHARD, SHARD, groups_of(sequences, manifest.group_size), old.padding
    )
    shards[1] = replace(info, tokens=old.tokens)
    replace(manifest, train=replace(manifest.train, shards=tuple(shards))).save(folder)


def with_tokens(sequences, place, value):
    sequence = sequences[0]
    tokens = sequence.tokens.astype(np.int64)
    tokens[place] = value
    return [replace(sequence, tokens=tokens), *sequences[1:]]


def with_layout(sequences, change):
    table = sequences[0].layout.table()
    change(table)
    columns = Layout(*(np.ascontiguousarray(column) for column in table.T))
    return [replace(sequences[0], layout=columns), *sequences[1:]]


def longer_first_block(table):
    table[0, 2] += 1
    table[1, 1] += 1
    table[1:, 3] += 1
    table[2:, 3] -= 1


def prefix_of_another_document(table):
    later = np.flatnonzero(table[:, 1] > table[:, 0])[-1]
    table[later, 0] = table[later, 1]


def block_beyond_the_end(table):
    table[-1, 1] += 1000
    table[-1, 2] += 1000


def without_last_block(sequences, _):
    table = sequences[0].layout.table()[:-1]
    layout = Layout(*(np.ascontiguousarray(column) for column in table.T))
    return [replace(sequences[0], layout=layout), *sequences[1:]]


CONTENT_DAMAGE = {
    "an id outside the vocabulary": (
        lambda s, m: with_tokens(s, 3, m.tokenizer.vocab_size),
        "id outside the vocabulary",
    ),
    "a mask token in a document": (
        lambda s, m: with_tokens(s, 3, m.tokenizer.mask_id),
        "the padding or the mask token",
    ),
    "a padding token in a document": (
        lambda s, m: with_tokens(s, 3, m.tokenizer.pad_id),
        "the padding or the mask token",
    ),
    "another token": (
        lambda s, m: with_tokens(s, 3, int(s[0].tokens[3]) - 1),
        "not the counts of the train split",
    ),
    "a sequence lost": (lambda s, m: s[:-1], "holds other counts"),
    "a block longer than the block size": (
        lambda s, m: with_layout(s, longer_first_block),
        "layout table does not fit",
    ),
    "a prefix that is not its document's": (
        lambda s, m: with_layout(s, prefix_of_another_document),
        "layout table does not fit",
    ),
    "a block beyond the end": (
        lambda s, m: with_layout(s, block_beyond_the_end),
        "layout table does not fit",
    ),
    "a block missing at full coverage": (without_last_block, "layout table does not fit"),
}


@pytest.mark.parametrize("kind", CONTENT_DAMAGE)
def test_content_that_breaks_the_contract_is_named(folder, kind):
    """All hashes fit: what is wrong is what the shards say."""
    change, text = CONTENT_DAMAGE[kind]
    rewritten(folder, change)
    with pytest.raises(UserError, match=text) as caught:
        verify_data(folder)
    expected = "token_counts.npy" if kind == "another token" else SHARD
    assert str(caught.value).startswith(f"{folder / expected}: ")


def test_tokens_inside_the_padding_are_named(folder):
    manifest = Manifest.load(folder)
    pad, length = manifest.tokenizer.pad_id, manifest.sequence_length
    name, sequences, number = next(
        (shard.name, sequences, number)
        for shard in manifest.train.shards
        for sequences in [list(read_shard(folder / shard.name))]
        for number, sequence in enumerate(sequences)
        if sequence.real_tokens(pad) < length - 1
    )
    tokens = sequences[number].tokens.copy()
    tokens[-1] = manifest.tokenizer.eos_id
    sequences[number] = replace(sequences[number], tokens=tokens)
    (old,) = (shard for shard in manifest.train.shards if shard.name == name)
    info, _ = write_shard(
        folder / name, name, groups_of(sequences, manifest.group_size), old.padding
    )
    shards = tuple(info if shard == old else shard for shard in manifest.train.shards)
    replace(manifest, train=replace(manifest.train, shards=shards)).save(folder)
    with pytest.raises(UserError, match="the padding holds other tokens") as caught:
        verify_data(folder)
    assert str(caught.value).startswith(f"{folder / name}: ")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda m: replace(m, train=replace(m.train, tokens=m.train.tokens + 1)),
            "the shards hold",
        ),
        (
            lambda m: replace(m, documents={**m.documents, "read": m.documents["read"] + 1}),
            "counts of documents do not add up",
        ),
        (
            lambda m: replace(m, heldout=replace(m.heldout, documents=m.heldout.documents + 1)),
            "counts of documents do not add up",
        ),
        (lambda m: replace(m, coverage=0.5), "layout table does not fit"),
        (lambda m: replace(m, sequence_length=64), "wrong length"),
    ],
)
def test_a_manifest_that_does_not_fit_the_shards_is_noticed(folder, change, text):
    change(Manifest.load(folder)).save(folder)
    with pytest.raises(UserError, match=text):
        verify_data(folder)


def test_a_tokenizer_with_other_ids_is_noticed(folder, texts):
    """Another model under the same name, its hash recorded: the control ids give it away."""
    other = train_sentencepiece(texts, 590, "bpe", 60_000, seed=1)
    path = other.save(folder)
    manifest = Manifest.load(folder)
    info = replace(manifest.tokenizer, sha256=sha256_of(path))
    replace(manifest, tokenizer=info).save(folder)
    with pytest.raises(UserError, match=r"tokenizer\.model: its ids differ"):
        verify_data(folder)


@pytest.mark.parametrize("choice", [["layout.shift=true"], ["layout.coverage=0.3"]])
def test_other_layouts_pass_too(command, overrides, tmp_path, choice):
    folder = tmp_path / "data"
    assert command(*overrides, *choice, f"output_dir={folder}").code == 0
    result = command("verify=true", f"output_dir={folder}")
    assert result.code == 0, result.err
    assert result.out.startswith(f"{folder}: ")


def test_an_index_that_points_elsewhere_is_noticed(folder):
    path = folder / "shard_index.npy"
    index = np.load(path)
    index[1] += 512
    np.save(path, index)
    manifest = Manifest.load(folder)
    replace(manifest, shard_index_sha256=sha256_of(path)).save(folder)
    with pytest.raises(UserError, match=r"shard_index\.npy: does not fit train/000000\.tar"):
        verify_data(folder)
