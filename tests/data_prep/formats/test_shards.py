"""Shards: plain webdataset reads them, the bytes are a function of the content, damage is named."""

import hashlib
import io
import os
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_groups import groups_of

from data_prep.formats.manifest import ShardInfo
from data_prep.formats.shards import (
    PackedSequence,
    ShardReader,
    decode_group,
    group_offsets,
    read_shard,
    write_shard,
    wrong_sizes,
)
from data_prep.layout import COLUMNS, build_layout
from tidar_common.errors import UserError

S, PAD = 32, 0


def sequences(count, highest=300, seed=0):
    """Random packed sequences of 1 to 5 documents; every third ends in padding."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        padding = int(rng.integers(1, 5)) if number % 3 == 0 else 0
        cuts = np.sort(rng.choice(np.arange(1, S - padding), rng.integers(0, 5), replace=False))
        lengths = np.diff([0, *cuts, S - padding])
        tokens = rng.integers(1, highest, S).astype(np.int32)
        tokens[S - padding :] = PAD
        layout = build_layout(lengths, 8, shift=True, rng=rng)
        with_padding = np.append(lengths, padding) if padding else lengths
        marks = rng.random(len(with_padding)) < 0.2
        made.append(PackedSequence(tokens, with_padding, layout, marks))
    return made


def padding_of(made):
    return sum(S - one.real_tokens(PAD) for one in made)


def write(path, made, group_size=4):
    return write_shard(path, f"train/{path.name}", groups_of(made, group_size), padding_of(made))[0]


def assert_equal(read, made):
    assert len(read) == len(made)
    for one, other in zip(read, made, strict=True):
        assert np.array_equal(one.tokens, other.tokens)
        assert np.array_equal(one.document_lengths, other.document_lengths)
        assert np.array_equal(one.layout.table(), other.layout.table())
        assert np.array_equal(one.continued, other.continued)


def read_groups(path, offsets):
    reader = ShardReader(path, offsets)
    return [reader.read_group(number) for number in range(len(offsets) - 1)]


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "000000.tar"
    write(path, sequences(10))
    return path


def test_plain_webdataset_reads_documented_arrays(shard):
    made = sequences(10)
    samples = list(webdataset.WebDataset(str(shard), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == ["00000000", "00000001", "00000002"]
    assert [len(sample["tokens.npy"]) for sample in samples] == [4, 4, 2]
    first = 0
    for sample in samples:
        tokens, lengths, layout = (
            sample[name] for name in ("tokens.npy", "document_lengths.npy", "layout.npy")
        )
        group = made[first : first + len(tokens)]
        first += len(tokens)
        documents = max(len(one.document_lengths) for one in group)
        blocks = max(one.layout.num_blocks for one in group)
        assert tokens.shape == (len(group), S)
        assert lengths.shape == (len(group), documents)
        assert layout.shape == (len(group), blocks, len(COLUMNS))
        assert (lengths.sum(1) == S).all()
        for row, one in enumerate(group):
            assert np.array_equal(tokens[row], one.tokens)
            real = layout[row][layout[row, :, 2] > layout[row, :, 1]]
            assert np.array_equal(real, one.layout.table())


@pytest.mark.parametrize(
    ("highest", "kind"), [(255, np.uint8), (65_000, np.uint16), (151_936, np.uint32)]
)
def test_types_are_the_smallest_unsigned_that_hold_the_values(tmp_path, highest, kind):
    made = sequences(3, highest)
    made[0].tokens[0] = highest
    write(tmp_path / "0.tar", made)
    (sample,) = webdataset.WebDataset(str(tmp_path / "0.tar"), shardshuffle=False).decode()
    assert sample["tokens.npy"].dtype == kind
    assert sample["document_lengths.npy"].dtype == np.uint8
    assert sample["layout.npy"].dtype == np.uint8


def test_what_is_written_is_read_in_any_order(shard):
    made = sequences(10)
    assert_equal(list(read_shard(shard)), made)
    reader = ShardReader(shard)
    assert reader.num_groups == 3
    for number in (2, 0, 1):
        assert_equal(reader.read_group(number), made[4 * number : 4 * number + 4])


def test_padding_is_told_from_text(shard):
    for one, made in zip(read_shard(shard), sequences(10), strict=True):
        assert one.real_tokens(PAD) == made.real_tokens(PAD)
        assert (one.tokens[one.real_tokens(PAD) :] == PAD).all()


def test_the_entry_describes_the_file(tmp_path):
    path, made = tmp_path / "000007.tar", sequences(10)
    info = write(path, made)
    assert info.name == "train/000007.tar"
    assert (info.sequences, info.padding) == (10, padding_of(made))
    assert info.tokens == 10 * S - padding_of(made)
    assert info.bytes == path.stat().st_size
    assert info.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_bytes_depend_on_the_content_only(tmp_path):
    for name in ("a.tar", "b.tar"):
        write(tmp_path / name, sequences(10))
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid) == (0, 0, 0)
            assert (member.uname, member.gname) == ("", "")
    write(tmp_path / "b.tar", sequences(10, seed=1))
    assert (tmp_path / "a.tar").read_bytes() != (tmp_path / "b.tar").read_bytes()


def test_the_bytes_are_those_of_pythons_own_tar_writer(tmp_path):
    path = tmp_path / "a.tar"
    write(path, sequences(10))
    expected = io.BytesIO()
    with (
        tarfile.open(path) as read,
        tarfile.open(fileobj=expected, mode="w", format=tarfile.USTAR_FORMAT) as again,
    ):
        for member in read:
            entry = tarfile.TarInfo(member.name)
            entry.size = member.size
            again.addfile(entry, read.extractfile(member))
    assert path.read_bytes() == expected.getvalue()


def test_the_offsets_are_those_of_the_groups(tmp_path):
    path, made = tmp_path / "000000.tar", sequences(10)
    _, offsets = write_shard(path, "train/000000.tar", groups_of(made, 4), padding_of(made))
    assert offsets == group_offsets(path)
    assert len(offsets) == 4
    reader = ShardReader(path, offsets)
    for number in (2, 0, 1):
        assert_equal(reader.read_group(number), made[4 * number : 4 * number + 4])
    with pytest.raises(UserError, match="missing or damaged shard"):
        ShardReader(path, [512, offsets[1]]).read_group(0)


def test_an_error_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "000000.tar", sequences(10))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("part", [0.02, 0.2, 0.4, 0.5])
def test_a_truncated_shard_is_named_or_shorter(shard, part):
    """A cut at the end of a member looks like the end of the archive: the reader that is asked
    for a group by number names the shard, and verification counts."""
    content, offsets = shard.read_bytes(), group_offsets(shard)
    shard.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(UserError, match="missing or damaged shard") as caught:
        read_groups(shard, offsets)
    assert str(shard) in str(caught.value)
    made = sequences(10)
    try:
        read = list(read_shard(shard))
    except UserError as error:
        assert str(shard) in str(error)  # noqa: PT017
    else:
        assert len(read) < len(made)
        assert_equal(read, made[: len(read)])


@pytest.mark.parametrize("place", ["tar header", "npy header", "document lengths", "layout"])
def test_a_flipped_byte_in_the_structure_is_named(shard, place):
    content, offsets = bytearray(shard.read_bytes()), group_offsets(shard)
    with tarfile.open(shard) as tar:
        members = {member.name: member for member in tar}
    spots = {
        "tar header": members["00000001.tokens.npy"].offset + 3,
        "npy header": members["00000001.tokens.npy"].offset_data + 1,
        "document lengths": members["00000001.document_lengths.npy"].offset_data + 128,
        "layout": members["00000001.layout.npy"].offset_data + 128 + 3 + 4,
    }
    content[spots[place]] ^= 0x15
    shard.write_bytes(content)
    with pytest.raises(UserError, match="missing or damaged shard") as caught:
        read_groups(shard, offsets)
    assert str(shard) in str(caught.value)


@pytest.mark.parametrize("last", ["continued", "prompt_lengths"])
def test_a_damaged_header_of_the_last_member_is_named(tmp_path, last):
    """tarfile ends there in silence, and prompts are a member that need not be there."""
    path, made = tmp_path / "000000.tar", sequences(8)
    if last == "prompt_lengths":
        made = [replace(one, prompt_lengths=np.zeros_like(one.document_lengths)) for one in made]
    write(path, made)
    offsets = group_offsets(path)
    with tarfile.open(path) as tar:
        members = {member.name: member for member in tar}
    content = bytearray(path.read_bytes())
    content[members[f"00000000.{last}.npy"].offset + 150] ^= 0x15
    path.write_bytes(content)
    with pytest.raises(UserError, match="missing or damaged shard"):
        read_groups(path, offsets)


@pytest.mark.parametrize("size", [-512, -1024, 10**6])
def test_a_member_of_an_impossible_size_is_named(tmp_path, size):
    """One below zero would have some versions of tarfile go back, and never end."""
    entry = tarfile.TarInfo("00000000.tokens.npy")
    entry.size = size
    path = tmp_path / "000000.tar"
    path.write_bytes(entry.tobuf(tarfile.GNU_FORMAT) + bytes(512))
    with pytest.raises(UserError, match="missing or damaged shard"):
        ShardReader(path, [0, 1024]).read_group(0)
    with pytest.raises(UserError, match="missing or damaged shard"):
        list(read_shard(path))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2000), st.binary(min_size=1, max_size=12))
def test_any_damaged_bytes_are_one_error_or_another_group(whole_group, place, change):
    """Tar headers and array headers: no other exception, and no reading without end."""
    path, content = whole_group
    damaged = content[:place] + change + content[place + len(change) :]
    path.write_bytes(damaged[: len(content)])
    try:
        group = ShardReader(path, [0, len(content)]).read_group(0)
        assert all(len(sequence.tokens) > 0 for sequence in group)
    except UserError as error:
        assert str(path) in str(error)  # noqa: PT017


@pytest.fixture(scope="module")
def whole_group(tmp_path_factory):
    """A path to write to, and the bytes of a group without what ends an archive."""
    path = tmp_path_factory.mktemp("group") / "000000.tar"
    write(path, sequences(2))
    return path, path.read_bytes()[: group_offsets(path)[1]]


def test_a_missing_shard_is_named(tmp_path):
    for read in (ShardReader, lambda path: list(read_shard(path))):
        with pytest.raises(UserError, match=r"none\.tar: missing or damaged shard"):
            read(tmp_path / "none.tar")


def test_missing_members_are_named():
    with pytest.raises(
        ValueError, match=r"members missing: document_lengths\.npy, layout\.npy, continued\.npy"
    ):
        decode_group({"tokens.npy": b""})


def test_wrong_sizes_are_told_in_order_and_nothing_is_read(tmp_path):
    (tmp_path / "train").mkdir()
    shards = [ShardInfo(f"train/{n:06d}.tar", 1, 1, 0, n % 7, "") for n in range(300)]
    for shard in shards:
        (tmp_path / shard.name).write_bytes(b"?" * shard.bytes)
    assert wrong_sizes(tmp_path, shards) == []
    assert wrong_sizes(tmp_path, []) == []
    missing, short, long = (tmp_path / shards[n].name for n in (5, 41, 299))
    missing.unlink()
    short.write_bytes(b"?" * 5)
    long.write_bytes(b"?" * 6)
    assert wrong_sizes(tmp_path, shards) == [
        f"{missing} is missing",
        f"{short} has 5 bytes, the manifest says 6",
        f"{long} has 6 bytes, the manifest says 5",
    ]
