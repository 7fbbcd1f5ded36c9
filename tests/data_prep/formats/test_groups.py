"""Groups read at once hold what reading them row by row with numpy alone gives."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_groups import arrays_of, encoded

from data_prep.formats.groups import (
    PackedGroup,
    PackedSequence,
    decode_group,
    npy_array,
)
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
    found = npy_array(buffer.getvalue())
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    assert np.array_equal(found, array)


def test_arrays_that_are_none_are_refused():
    buffer = io.BytesIO()
    np.save(buffer, np.arange(40, dtype="<u2"))
    whole = buffer.getvalue()
    huge = whole.replace(b"(40,), }" + b" " * 20, b"(" + b"9" * 22 + b",), }")
    assert len(huge) == len(whole)
    for content in (whole[:-1], whole[:100], whole[:9], b"", b"?" * 200, b"PK\3\4" * 50, huge):
        with pytest.raises(ValueError):  # noqa: PT011
            npy_array(content)
    for array, reason in (([{}], "allow_pickle"), ([1.5], "float64"), (["a"], "<U1")):
        other = io.BytesIO()
        np.save(other, np.array(array))
        with pytest.raises(ValueError, match=reason):
            npy_array(other.getvalue())


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 127), st.binary(min_size=1, max_size=8))
def test_a_damaged_header_is_a_value_error_or_another_array(place, change):
    """Nothing else may come out of numpy's parser: it would be a traceback."""
    buffer = io.BytesIO()
    np.save(buffer, np.arange(12, dtype="<u2").reshape(3, 4))
    whole = buffer.getvalue()
    try:
        found = npy_array(whole[:place] + change + whole[place + len(change) :])
    except ValueError:
        return
    assert found.nbytes <= len(whole)


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
    refused("two dimensions", tokens=tokens[0])
    refused("two dimensions", lengths=np.array(7))
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
