"""`inspect=N`: the picture is the attention rule, and the text says what stands in the sequence."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.formats.manifest import Manifest
from data_prep.inspect import show
from data_prep.inspect.show import NOTHING, attention_picture, stored_sequence
from pipeline.model.mask import dense_mask
from tidar_common.figures import png


def pixels_of(path: Path) -> np.ndarray:
    """A PNG back to its RGB pixels [height, width, 3]."""
    return np.asarray(Image.open(path).convert("RGB"))


def test_what_is_coloured_may_be_attended_to(prepared):
    manifest = Manifest.load(prepared)
    for number in (0, 5, manifest.train.sequences - 1):
        sequence = stored_sequence(prepared, manifest, number)
        real = sequence.real_tokens(manifest.tokenizer.pad_id)
        coloured = (attention_picture(sequence, real) != NOTHING).any(-1)
        expected = dense_mask(sequence.document_lengths, sequence.layout).numpy().copy()
        padding = slice(real, len(sequence.tokens))
        expected[padding, padding] = False  # padding attends to itself, which says nothing
        assert np.array_equal(coloured, expected)


def test_long_sections_are_cut_off(prepared, monkeypatch):
    manifest = Manifest.load(prepared)
    sequence = stored_sequence(prepared, manifest, 3)
    whole = attention_picture(sequence, 128)
    monkeypatch.setattr(show, "LARGEST_SECTION", 50)
    part = attention_picture(sequence, 128)
    both = np.r_[:50, 128:178]
    assert np.array_equal(part, whole[np.ix_(both, both)])


def test_the_command_prints_and_draws(command, prepared, tmp_path):
    folder = shutil.copytree(prepared, tmp_path / "data")
    result = command(f"output_dir={folder}", "inspect=2")
    assert result.code == 0, result.err
    path = tmp_path / "data-inspect-2.png"
    assert result.out.splitlines()[-1] == str(path)
    manifest = Manifest.load(folder)
    sequence = stored_sequence(folder, manifest, 2)
    assert "clean section: 128 tokens" in result.out
    assert "document 0: 0 to" in result.out
    assert "0: nothing, 0 to 7, 0 to 7" in result.out
    drawn = attention_picture(sequence, sequence.real_tokens(manifest.tokenizer.pad_id))
    assert np.array_equal(pixels_of(path), drawn)
    assert png(drawn) == path.read_bytes()
    last = manifest.train.sequences - 1
    result = command(f"output_dir={folder}", f"inspect={last + 1}")
    assert result.code == 2
    assert f"inspect: there are {last + 1} sequences, so give a number up to {last}" in result.err


@pytest.mark.parametrize("number", [-1])
def test_a_number_below_nothing_is_refused(command, tmp_path, number):
    result = command(f"output_dir={tmp_path}", f"inspect={number}")
    assert result.code == 2
    assert "inspect: must be at least 0" in result.err


def test_a_picture_that_cannot_be_written_is_one_line(command, prepared, tmp_path):
    folder = shutil.copytree(prepared, tmp_path / "data")
    (tmp_path / "data-inspect-0.png").mkdir()
    result = command(f"output_dir={folder}", "inspect=0")
    assert result.code == 2
    assert "data-inspect-0.png cannot be written (Is a directory)" in result.err
    assert {path.name for path in tmp_path.iterdir()} == {"data", "data-inspect-0.png"}
