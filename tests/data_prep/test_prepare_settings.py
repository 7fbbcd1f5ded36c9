"""Every mistake in the config of `tidar-prepare` is one line that names the key."""

import json
import re
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from data_prep.config import LayoutConfig, TokenizerConfig
from tidar_common.cli import compose
from tidar_common.config import parse
from tidar_common.errors import UserError
from tidar_common.schema import CHOICES

MISTAKES = [
    ("sequence_length=1", "sequence_length: must be at least 2, got 1"),
    ("sequence_length=abc", "sequence_length: Value 'abc' of type 'str' could not be"),
    ("sequence_length=null", "sequence_length: "),
    ("workers=0", "workers: must be at least 1, got 0"),
    ("workers=1.5", "workers: Value '1.5'"),
    ("seed=-1", "seed: must be at least 0, got -1"),
    ("group_size=0", "group_size: must be at least 1"),
    ("shard_sequences=0", "shard_sequences: must be at least 1"),
    ("shard_bytes=0", "shard_bytes: must be at least 1"),
    ("layout.block_sizes=[4,0]", "layout.block_sizes: must be at least 1, got 0"),
    ("layout.block_sizes=[4,99]", "layout.block_sizes: 99 is above layout.block_size 16"),
    ("layout.block_shares=[1]", "layout.block_shares: says how often to draw"),
    ("task_bytes=0", "task_bytes: must be at least 1"),
    ("packing=worst_fit", "packing: 'worst_fit' is not best_fit or concatenate"),
    ("array=4/4", "array: '4/4' is not i/n with i from 0 to n-1; the third of four is 2/4"),
    ("array=1", "array: '1' is not i/n"),
    ("heldout_fraction=-0.1", "heldout_fraction: must be in [0, 1), got -0.1"),
    ("heldout_fraction=1", "heldout_fraction: must be in [0, 1), got 1"),
    ("heldout_path=held/", "heldout_path: corpus=python_stdlib has no path"),
    ("heldout_fraction=nan", "heldout_fraction: must be a finite number, got nan"),
    ("verify=maybe", "verify: Value 'maybe' is not a valid bool"),
    ("layout.block_size=0", "layout.block_size: must be at least 1, got 0"),
    ("layout.coverage=0", "layout.coverage: must be in (0, 1], got 0"),
    ("layout.shift=1.5", "layout.shift: Value '1.5'"),
    ("+layout.step=2", "layout.step: unknown key; known are block_shares, block_size"),
    ("+sequence_lenght=64", "sequence_lenght: unknown key; did you mean sequence_length?"),
    ("sequence_lenght=64", "sequence_lenght: unknown key; did you mean sequence_length?"),
    ("tokenizer.vocab_size=100", "tokenizer.vocab_size: 100 is below 300"),
    ("tokenizer.model_type=word", "tokenizer.model_type: 'word' is not unigram or bpe"),
    ("tokenizer.kind=wordpiece", "tokenizer.kind: unknown value 'wordpiece'"),
    ("tokenizer.sample_bytes=0", "tokenizer.sample_bytes: must be at least 1"),
    ("tokenizer.path=/none", "tokenizer.path: /none does not exist"),
    ("tokenizer=huggingface", "tokenizer.path: has no value; set tokenizer.path=..."),
    (
        "tokenizer=wordpiece",
        "tokenizer: unknown choice 'wordpiece'; known are hugg",
    ),
    ("corpus=jsonl", "corpus.path: has no value; set corpus.path=... on the command line"),
    ("corpus=nothing", "corpus: unknown choice 'nothing'; known are arrow, jsonl, mix, parquet, "),
    ("sequence_length", "sequence_length"),
]


@pytest.mark.parametrize(("mistake", "text"), MISTAKES)
def test_a_mistake_is_one_line_that_names_the_key(command, tmp_path, mistake, text):
    folder = tmp_path / "data"
    result = command(f"output_dir={folder}", mistake)
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert text in result.err
    assert not folder.exists(), "a mistake must not leave an empty folder"


def test_a_mistake_in_the_held_out_set_is_one_line(command, overrides, tmp_path):
    out = f"output_dir={tmp_path / 'data'}"
    plain = [option for option in overrides if not option.startswith("heldout_fraction")]
    result = command(*plain, "heldout_path=/none", out)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert result.err.startswith("error: heldout_path: /none")
    result = command(*overrides, "heldout_path=/none", out)
    assert "heldout_fraction: not with heldout_path" in result.err


def test_a_missing_output_dir_is_named(command):
    result = command()
    assert result.code == 2
    assert result.err == "error: output_dir: has no value; set output_dir=... on the command line\n"


@pytest.mark.parametrize("kind", ["file", "foreign", "read-only"])
def test_an_output_dir_that_cannot_be_used_is_named(command, overrides, tmp_path, kind):
    folder = tmp_path / "data"
    if kind == "file":
        folder.write_text("text")
    elif kind == "foreign":
        folder.mkdir()
        (folder / "thesis.tex").write_text("text")
    else:
        folder = Path("/proc/none")
    result = command(*overrides, f"output_dir={folder}")
    assert result.code == 2
    assert result.err.startswith(f"error: output_dir: {folder} ")
    assert result.err.count("\n") == 1
    if kind == "foreign":
        assert "thesis.tex" in result.err
        assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


def test_a_tokenizer_of_another_kind_is_named(command, overrides, tmp_path, tokenizer_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        result = command(*overrides, f"tokenizer.path={path}", f"output_dir={tmp_path / 'data'}")
        assert result.code == 2
        assert str(tmp_path) in result.err
    kept = [one for one in overrides if not one.startswith("tokenizer.")]
    wrong = ["tokenizer=huggingface", f"tokenizer.path={tokenizer_path}"]
    result = command(*kept, *wrong, f"output_dir={tmp_path / 'data'}")
    assert (
        result.err == f"error: tokenizer.path: {tokenizer_path} is not for tokenizer=huggingface\n"
    )


def test_help_names_the_choices_that_exist(command):
    result = command("--help")
    text = " ".join(result.out.split())
    for group in ("corpus", "tokenizer"):
        for choice in (name for of, name in CHOICES if of == group):
            assert re.search(rf"{group}= [^=]*\b{choice}\b", text), choice
    assert "130 interrupted" in text
    assert "deepspeed" not in text, "groups of other commands do not belong here"


def test_the_config_can_be_shown(command):
    result = command("--cfg", "job", "sequence_length=77")
    shown = yaml.safe_load(result.out)
    assert shown["sequence_length"] == 77
    assert shown["corpus"] == {"kind": "python_stdlib", "max_bytes": None}


def test_the_defaults_are_those_of_the_dataclasses():
    cfg = compose("prepare")
    assert parse(LayoutConfig, cfg.layout, "layout") == LayoutConfig()
    assert parse(TokenizerConfig, cfg.tokenizer, "tokenizer") == TokenizerConfig()


def test_a_section_that_is_no_group_is_named():
    cfg = OmegaConf.create(json.loads('{"layout": 3}'))
    with pytest.raises(
        UserError, match=r"layout: expected a group of keys \(block_shares, block_size"
    ):
        parse(LayoutConfig, cfg.layout, "layout")
