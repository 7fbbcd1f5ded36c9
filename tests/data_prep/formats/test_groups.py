"""Groups read at once hold what reading them row by row with numpy alone gives."""

import io
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_groups import arrays_of, encoded

from data_prep.formats import shards
from data_prep.formats.groups import (
    MEMBERS,
    PackedGroup,
    PackedSequence,
    decode_group,
    npy_array,
)
from data_prep.formats.shards import tar_members
from data_prep.layout import Layout, build_layout

S = 24


def made(seed, count, *, prompts):
    """Random sequences; some have no block at all."""
    rng = np.random.default_rng(seed)
    sequences = []
    for _ in range(count):
        cuts = np.sort(rng.choice(np.arange(1, S), rng.integers(0, 6), replace=False))
        lengths = np.diff([0, *cuts, S])
        own = rng.integers(0, lengths, endpoint=True) if prompts else None
        layout = build_layout(lengths, int(rng.integers(1, 9)), rng=rng, prompt_lengths=own)
        marks = rng.random(len(lengths)) < 0.3
        tokens = rng.integers(0, int(rng.choice([200, 70_000])), S)
        sequences.append(PackedSequence(tokens, lengths, layout, marks, own))
    return sequences


def row_by_row(sample):
    """The oracle: numpy's reader, and each row by itself."""
    arrays = {name: np.load(io.BytesIO(content)) for name, content in sample.items()}
    found = []
    for row in range(len(arrays["tokens.npy"])):
        real = arrays["document_lengths.npy"][row] > 0
        prompts = arrays.get("prompt_lengths.npy")
        found.append(
            PackedSequence(
                arrays["tokens.npy"][row],
                arrays["document_lengths.npy"][row][real],
                Layout.from_table(arrays["layout.npy"][row]),
                arrays["continued.npy"][row][real].astype(bool),
                None if prompts is None else prompts[row][real],
            )
        )
    return found


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 9), prompts=st.booleans())
def test_a_group_is_its_rows(seed, count, prompts):
    sample = encoded(arrays_of(made(seed, count, prompts=prompts)))
    group, expected = decode_group(sample), row_by_row(sample)
    assert len(group) == len(expected) == len(list(group)) == count
    for one, other in zip(group, expected, strict=True):
        for name in ("tokens", "document_lengths", "continued", "prompt_lengths"):
            own, wanted = getattr(one, name), getattr(other, name)
            assert (own is None) == (wanted is None)
            if wanted is not None:
                assert own.dtype == wanted.dtype
                assert own.tolist() == wanted.tolist()
        assert one.layout.table().dtype == np.int32
        assert np.array_equal(one.layout.table(), other.layout.table())
    assert [one.tokens.tolist() for one in group[1:-1]] == [
        one.tokens.tolist() for one in expected[1:-1]
    ]
    assert np.array_equal(group[-1].tokens, expected[-1].tokens)
    with pytest.raises(IndexError):
        group[count]


@pytest.mark.parametrize("array", [
    np.arange(12, dtype="<u2").reshape(3, 4),
    np.asfortranarray(np.arange(12, dtype="<u4").reshape(3, 4)),
    np.arange(12, dtype=">u2").reshape(3, 4),
    np.arange(12, dtype="<i8"),
    np.zeros((3, 0, 4), dtype="|u1"),
    np.array(7, dtype="|u1"),
])  # fmt: skip
@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_arrays_are_those_that_numpy_reads(array, version):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=version)
    for content in (buffer.getvalue(), memoryview(bytearray(buffer.getvalue()))):
        found = npy_array(content)
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        assert np.array_equal(found, array)


def test_arrays_that_are_none_are_refused():
    buffer = io.BytesIO()
    np.save(buffer, np.arange(40, dtype="<u2"))
    whole = buffer.getvalue()
    huge = whole.replace(b"(40,), }" + b" " * 20, b"(" + b"9" * 22 + b",), }")
    assert len(huge) == len(whole)
    for content in (whole[:-1], whole[:100], whole[:9], b"", b"?" * 200, huge):
        with pytest.raises((ValueError, EOFError, OSError)):
            npy_array(content)
    pickled = io.BytesIO()
    np.save(pickled, np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        npy_array(pickled.getvalue())


def test_what_does_not_fit_together_is_refused():
    sample = encoded(arrays_of(made(3, 4, prompts=True)))
    tokens, lengths, layouts, continued, prompts = (
        np.load(io.BytesIO(content)).astype(np.int64) for content in sample.values()
    )

    def refused(message, **changes):
        arrays = {"tokens": tokens, "lengths": lengths, "layouts": layouts,
                  "continued": continued, "prompts": prompts, **changes}  # fmt: skip
        with pytest.raises(ValueError, match=message):
            PackedGroup(*arrays.values())

    PackedGroup(tokens, lengths, layouts, continued, prompts)
    refused("different numbers", tokens=tokens[:3])
    refused("different numbers", continued=continued[:, 1:])
    refused("add up", tokens=tokens[:, 1:])
    refused("prompts", prompts=lengths + 1)
    refused("prompts", prompts=prompts[:, 1:])
    refused("tables are", layouts=layouts[..., :3])
    refused("document lengths with zeros", lengths=np.roll(np.pad(lengths, ((0, 0), (0, 1))), 1, 1),
            continued=np.pad(continued, ((0, 0), (0, 1))), prompts=None)  # fmt: skip
    refused("layout tables with zeros", layouts=np.roll(np.pad(layouts, ((0, 0), (0, 1), (0, 0))),
                                                        1, 1))  # fmt: skip
    moved = layouts.copy()
    moved[0, 0, 3] += 1
    refused("slot_start", layouts=moved)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 2**33 - 1), st.sampled_from(MEMBERS), st.integers(0, 511),
    st.binary(max_size=8), st.booleans(),
)  # fmt: skip
def test_headers_are_read_as_tarfile_reads_them(size, member, place, change, summed):
    """Whole, and with some bytes changed, `summed` anew or not: the same name and size, or both
    refuse."""
    entry = tarfile.TarInfo(f"{size % 10**8:08d}.{member}")
    entry.size = size
    whole = entry.tobuf(tarfile.USTAR_FORMAT)
    assert shards._name_and_size(whole) == (entry.name, size)
    changed = (whole[:place] + change + whole[place + len(change) :])[:512]
    if summed:
        rest = changed[:148] + b" " * 8 + changed[156:]
        changed = changed[:148] + b"%06o\0 " % sum(rest) + changed[156:]
    try:
        expected = tarfile.TarInfo.frombuf(changed, "utf-8", "surrogateescape")
        shards.check_member(expected)
    except (tarfile.TarError, ValueError):
        with pytest.raises((tarfile.TarError, ValueError)):
            shards._name_and_size(changed)
    else:
        assert shards._name_and_size(changed) == (expected.name, expected.size)


@pytest.mark.parametrize("size", [-512, -1024, 10**6])
def test_a_member_of_an_impossible_size_is_refused(size):
    """One below zero would have the reader go back, and never end."""
    entry = tarfile.TarInfo("00000000.tokens.npy")
    entry.size = size
    header = entry.tobuf(tarfile.GNU_FORMAT)
    with pytest.raises((EOFError, tarfile.TarError, ValueError)):
        tar_members(memoryview(header + bytes(512)))
