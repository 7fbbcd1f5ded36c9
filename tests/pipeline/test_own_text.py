"""Text by the model itself: from prepared data over answers in shares to data for training."""

import fcntl
import json
import os
import subprocess

import commands
import pytest
import torch
from document_sets import prepare_documents, prepare_here
from private_slurm import wait_until
from small_models import (
    random_model,
    sentencepiece_tokenizer,
    small_config,
    write_checkpoint,
)
from test_generate import call

from data_prep.formats.manifest import Manifest
from data_prep.formats.shards import read_shard
from data_prep.tokenizers.load import load_tokenizer
from pipeline.decoding.prompts import DocumentPrompts, Share

PROMPTS = 240


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return prepare_documents(tmp_path_factory.mktemp("documents"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random model, for which the end token is as likely as to end some answers."""
    tokenizer, model = sentencepiece_tokenizer(), random_model(small_config())
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.eos_id] *= 2.5
    return write_checkpoint(tmp_path_factory.mktemp("own") / "step", model, tokenizer)


@pytest.fixture
def generating(checkpoint, data_dir):
    return (
        f"checkpoint={checkpoint}", f"prompts_data={data_dir}", "prompt_tokens=5", "batch_size=3",
        f"prompts_limit={PROMPTS}", "max_new_tokens=14", "temperature=1", "seed=7",
    )  # fmt: skip


def lines(*paths) -> dict[str, dict]:
    found = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    assert len({line["id"] for line in found}) == len(found), "an answer stands there twice"
    return {line["id"]: {**line, "seconds": 0} for line in found}


def prepare_answers(data_dir, answers, output) -> Manifest:
    code = prepare_here(
        "corpus=jsonl", f"corpus.path={answers}", "corpus.id_field=id", "sequence_length=48",
        "corpus.prompt_field=prompt", "corpus.cut_field=cut", "layout.loss_span=response",
        f"tokenizer.path={data_dir}", "layout.block_size=4", "heldout_fraction=0.2",
        f"output_dir={output}",
    )  # fmt: skip
    assert code == 0
    return Manifest.load(output)


def kill_two_ranks(overrides, parts) -> None:
    """Two ranks as torchrun would start them, killed when both have written some answers."""
    ranks = [
        subprocess.Popen(
            commands.command("pipeline.generate", *overrides), cwd=commands.ROOT,
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"}, stderr=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        wait_until(
            lambda: all(p.is_file() and p.read_bytes().count(b"\n") > 2 for p in parts), 120, str
        )
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def test_shares_killed_and_gone_on_with_become_training_data(
    monkeypatch, generating, data_dir, tmp_path
):
    folder = tmp_path / "answers"
    folder.mkdir()
    output = f"output={folder / 'own.jsonl'}"
    parts = [folder / f"own-{n:05d}-of-00002.jsonl" for n in range(2)]
    kill_two_ranks((*generating, output), parts)
    begun = [path.read_bytes() for path in parts]
    begun = [content[: content.rfind(b"\n") + 1] for content in begun]
    assert sum(content.count(b"\n") for content in begun) < PROMPTS
    parts[0].write_bytes(begun[0] + b'{"id": "train/0000')
    done = commands.run("pipeline.generate", *generating, output, processes=2)
    assert done.returncode == 0, done.stderr
    for number, path in enumerate(parts):
        assert path.read_bytes().startswith(begun[number])
        assert f"share {number} of 2: tidar: " in done.stderr
        assert f"{path}: 120 answers, " in done.stderr
    assert call(monkeypatch, *generating, f"output={tmp_path / 'alone.jsonl'}") == 0
    answers = lines(*parts)
    assert len(answers) == PROMPTS
    assert answers == lines(tmp_path / "alone.jsonl"), "texts depend on the number of shares"
    assert {line["stopped_by"] for line in answers.values()} == {"eos", "length"}

    manifest = prepare_answers(data_dir, folder, tmp_path / "data")
    empty = sum(not line["text"] for line in answers.values())
    assert manifest.documents["refused"] == ({"empty": empty} if empty else {})
    check_data(manifest, tmp_path / "data", answers)


def check_data(manifest, data, answers) -> None:
    """Every document is its prompt and its answer, with an end token where the model put one."""
    tokenizer = load_tokenizer(data)
    expected = {}
    for line in answers.values():
        if line["text"]:
            prompt, text = tokenizer.encode(line["prompt"]), tokenizer.encode(line["text"])
            end = [] if line["stopped_by"] == "length" else [tokenizer.eos_id]
            expected[line["id"]] = ((*prompt, *text, *end), len(prompt))
    found, slots = [], 0
    for path in data.glob("*/*.tar"):
        for sequence in read_shard(path):
            slots += sequence.layout.num_slots
            real, start = sequence.real_tokens(tokenizer.pad_id), 0
            rows = zip(sequence.document_lengths, sequence.prompt_lengths, strict=True)
            for length, prompt in rows:
                if start < real:
                    ids = tuple(sequence.tokens[start : start + length].tolist())
                    found.append((ids, int(prompt)))
                start += length
    assert sorted(found) == sorted(expected.values())
    assert any(ids[-1] == tokenizer.eos_id for ids, _ in found)
    assert any(ids[-1] != tokenizer.eos_id for ids, _ in found)
    tokens = sum(len(ids) for ids, _ in found)
    assert sum(split.tokens for split in manifest.splits.values()) == tokens
    assert slots == tokens - sum(prompt for _, prompt in found), "prompts carry no loss"
    assert manifest.loss_span == "response"
    # And these prompts can be asked again, by a model that was trained on them.
    again: list[str] = []
    for split in ("train", "heldout"):
        prompts = DocumentPrompts(
            data, tokenizer, split=split, prompt_tokens=None, limit=None, share=Share()
        )
        again += [prompts[place].prompt for place in range(len(prompts))]
    assert sorted(again) == sorted(line["prompt"] for line in answers.values() if line["text"])


def test_one_file_has_one_writer(monkeypatch, capsys, generating, tmp_path):
    path = tmp_path / "own.jsonl"
    with path.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert call(monkeypatch, *generating, f"output={path}") == 2
    assert "own.jsonl is being written by another process; wait for it" in capsys.readouterr().err


def test_another_number_of_shares_is_refused(monkeypatch, capsys, generating, tmp_path):
    command = (*generating, f"output={tmp_path / 'own.jsonl'}", "prompts_limit=4")
    assert call(monkeypatch, *command, "array=0/2") == 0
    for other in ("array=0/3", "array=null"):
        assert call(monkeypatch, *command, other) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert "own-00000-of-00002.jsonl was begun in 2 shares, and these are" in error
    # A share without a prompt leaves an empty file, and other prompts or splits are refused.
    assert call(monkeypatch, *command, "array=1/2", "prompts_limit=1") == 0
    assert (tmp_path / "own-00001-of-00002.jsonl").read_text() == ""
    for other in ("prompt_tokens=6", "prompts_split=heldout", "max_new_tokens=13"):
        assert call(monkeypatch, *command, "array=0/2", other) == 2
        assert "texts of another model, other prompts or other settings" in capsys.readouterr().err
    assert call(monkeypatch, *command, "array=0/2", "prompts_limit=6") == 0, "more of the same"
    assert len(lines(tmp_path / "own-00000-of-00002.jsonl")) == 3


def test_a_prompt_that_is_too_long_is_skipped(monkeypatch, capsys, checkpoint, data_dir, tmp_path):
    prompts, output = tmp_path / "in.jsonl", tmp_path / "out" / "own.jsonl"
    output.parent.mkdir()
    rows = ["def f(", "x = 1\n" * 200, *(f"import {number}" for number in range(20))]
    prompts.write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    command = (f"checkpoint={checkpoint}", f"prompts_file={prompts}", f"output={output}")
    for _ in range(2):  # and when all is done
        assert call(monkeypatch, *command, "max_new_tokens=9") == 0
        assert "21 answers, " in (error := capsys.readouterr().err)
        assert "1 prompts skipped as too long" in error
    assert [lines(output)[n]["stopped_by"] == "skipped" for n in "012"] == [False, True, False]
    manifest = prepare_answers(data_dir, output, tmp_path / "data")
    empty = sum(not line["text"] for line in lines(output).values())
    assert manifest.documents["refused"] == {"empty": empty}
    assert call(monkeypatch, *command, "max_new_tokens=256") == 2
    assert "max_new_tokens: 256 leave no room for a prompt" in capsys.readouterr().err
    rows[0] = "def g("
    prompts.write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    assert call(monkeypatch, *command, "max_new_tokens=9") == 2
    assert "answers another prompt than the one that has id 0 now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prompts_file=a.jsonl"], "prompts_data: given together with prompts_file"),
        (["prompt=x"], "prompts_data: given together with another prompt"),
        (["prompt_tokens=0"], "prompt_tokens: must be at least 1"),
        (["array=2/2"], "array: '2/2' is not i/n with i from 0"),
        (["prompts_data=null"], "output: is for many prompts; give prompts_file or prompts_data"),
        (["prompts_data=/nowhere"], "manifest.json: not found"),
    ],
)
def test_mistakes_are_named(monkeypatch, capsys, generating, tmp_path, overrides, message):
    command = (*generating, f"output={tmp_path / 'own.jsonl'}", *overrides)
    assert call(monkeypatch, *command) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
