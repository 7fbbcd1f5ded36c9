"""`tidar-prepare` end to end: the same bytes from any number of workers, nothing lost, nothing
mixed, nothing overwritten by mistake."""

import fcntl
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from data_prep.config import PrepareSettings
from data_prep.formats.manifest import SPLITS, Manifest
from data_prep.formats.shards import read_shard
from data_prep.tokenizers.load import load_tokenizer
from tidar_common.cli import config_dir


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def texts_of(folder: Path, split: str) -> list[str]:
    """The text of every piece in a split's shards; a document that was cut gives several."""
    manifest = Manifest.load(folder)
    tokenizer = load_tokenizer(folder)
    found = []
    for shard in manifest.splits[split].shards:
        for sequence in read_shard(folder / shard.name):
            real = sequence.real_tokens(tokenizer.pad_id)
            ends = np.cumsum(sequence.document_lengths)
            pieces = np.split(sequence.tokens[:real], ends[ends < real])
            found += [tokenizer.decode(piece) for piece in pieces]
    return found


def test_one_two_and_three_workers_give_the_same_bytes(command, overrides, prepared, tmp_path):
    for name, workers in (("again", 1), ("two", 2), ("three", 3)):
        result = command(*overrides, f"output_dir={tmp_path / name}", f"workers={workers}")
        assert result.code == 0, result.err
        assert content(tmp_path / name) == content(prepared), "also the manifest, wherever it is"


def test_the_folder_holds_what_the_contract_says(prepared):
    manifest = Manifest.load(prepared)
    listed = {shard.name for split in manifest.splits.values() for shard in split.shards}
    top = {"manifest.json", "token_counts.npy", "shard_index.npy", "tokenizer.model"}
    assert set(content(prepared)) == listed | top
    assert len(manifest.train.shards) > 5
    chosen = {key: value for key, value in manifest.config["layout"].items() if value is not None}
    assert chosen == {
        "block_size": 8, "coverage": 1.0, "shift": False, "loss_span": "document",
    }  # fmt: skip
    assert not {"output_dir", "workers", "array", "verify", "overwrite"} & set(manifest.config)
    assert manifest.tokenizer.file == "tokenizer.model"


def test_every_document_is_in_the_shards(prepared, texts, tokenizer):
    pieces = [*texts_of(prepared, "train"), *texts_of(prepared, "heldout")]
    short = {text for text in texts if len(tokenizer.encode(text)) < 128}
    assert short
    assert short <= set(pieces)
    assert sum(map(len, pieces)) == pytest.approx(sum(map(len, texts)), rel=0.01)
    manifest = Manifest.load(prepared)
    count = len(texts)
    assert manifest.documents == {"read": count, "packed": count, "filtered": {}, "refused": {}}
    text_bytes = sum(len(text.encode()) for text in texts)
    assert sum(split.text_bytes for split in manifest.splits.values()) == text_bytes


def test_summary_and_refusals_are_printed(command, overrides, tmp_path, texts, write_corpus):
    path = write_corpus(tmp_path / "text.jsonl", [*texts, "", ""])
    result = command(*overrides, f"corpus.path={path}", f"output_dir={tmp_path / 'data'}")
    assert result.code == 0
    documents = Manifest.load(tmp_path / "data").documents
    assert documents["read"] == len(texts) + 2
    assert documents["packed"] == len(texts)
    assert documents["refused"] == {"empty": 2}
    lines = result.out.splitlines()
    assert lines[0].startswith("train: ")
    assert "refused: 2 documents, empty" in lines


def test_the_split_is_by_document_and_stays_when_the_corpus_grows(
    command, overrides, tmp_path, write_corpus
):
    """Every document repeats its own word: a word in both splits would be a document in both."""
    texts = [f"{word} " * 40 for word in (f"w{number}x" for number in range(150))]
    splits = []
    for count in (90, 150):
        folder = tmp_path / str(count)
        path = write_corpus(tmp_path / f"{count}.jsonl", texts[:count])
        assert command(*overrides, f"corpus.path={path}", f"output_dir={folder}").code == 0
        words = {
            split: {word for text in texts_of(folder, split) for word in text.split()}
            & {text.split()[0] for text in texts}
            for split in SPLITS
        }
        assert not words["train"] & words["heldout"]
        assert len(words["train"] | words["heldout"]) == count
        splits.append(words)
    assert splits[0]["heldout"] < splits[1]["heldout"]
    assert splits[0]["train"] < splits[1]["train"]


def test_a_finished_folder_is_left_alone(command, overrides, prepared):
    before = content(prepared)
    result = command(*overrides, f"output_dir={prepared}", "workers=2")
    assert result.code == 0
    assert "is prepared with these settings already" in result.out
    other = command(*overrides, f"output_dir={prepared}", "seed=1")
    assert other.code == 2
    assert "was prepared with other settings" in other.err
    assert content(prepared) == before


def test_overwrite_replaces_it_but_not_for_a_mistake(command, overrides, tmp_path):
    folder = tmp_path / "data"
    assert command(*overrides, f"output_dir={folder}").code == 0
    before = content(folder)
    for mistake in ("corpus.path=/none", "tokenizer.path=/none"):
        assert command(*overrides, f"output_dir={folder}", "overwrite=true", mistake).code == 2
        assert content(folder) == before, "a mistake must not cost the data"
    changes = ["overwrite=true", "sequence_length=256"]
    assert command(*overrides, f"output_dir={folder}", *changes).code == 0
    assert Manifest.load(folder).sequence_length == 256
    listed = {s.name for split in Manifest.load(folder).splits.values() for s in split.shards}
    assert {name for name in content(folder) if name.endswith(".tar")} == listed


def test_leftovers_of_other_settings_go(command, overrides, prepared, tmp_path):
    folder = tmp_path / "data"
    (folder / "train").mkdir(parents=True)
    for name in (
        "train/000099.tar", "train/.000000.tar.writing", "tokenizer.json",
        "tokenizer_config.json", ".manifest.json.writing",
    ):  # fmt: skip
        (folder / name).write_text("{}")
    assert command(*overrides, f"output_dir={folder}").code == 0
    assert content(folder) == content(prepared)


def test_a_finished_folder_tells_that_its_corpus_has_changed(
    command, texts, tokenizer_path, tmp_path
):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, text in enumerate(texts[:30]):
        (corpus / f"{number:02d}.txt").write_text(text)
    again = ("corpus=text_folder", f"corpus.path={corpus}", f"output_dir={tmp_path / 'data'}",
             f"tokenizer.path={tokenizer_path}", "sequence_length=64",
             "heldout_fraction=0.3")  # fmt: skip
    assert command(*again).code == 0

    def said() -> list[str]:
        result = command(*again)
        assert (result.code, result.err) == (0, "")
        first, *rest = result.out.splitlines()
        assert "is prepared with these settings already" in first
        return rest

    assert said() == []
    kept = (corpus / "00.txt").read_text()
    (corpus / "00.txt").unlink()
    (line,) = said()
    assert line.startswith("its corpus is no longer what it was made from: 30 files and ")
    assert ", 29 files and " in line.replace("then, ", ", ")
    (corpus / "00.txt").write_text(kept)
    assert said() == []
    (corpus / "00.txt").rename(corpus / "x.txt")
    assert len(said()) == 1
    shutil.rmtree(corpus)
    (line,) = said()
    assert line.startswith("its corpus cannot be compared with what it was made from: corpus.path")


@pytest.mark.parametrize("files", [30, 150])
def test_a_small_folder_prepares_as_it_is(command, tokenizer_path, tmp_path, files):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(files):
        text = " ".join(f"{number} and {n * number % 71}" for n in range(200))
        (corpus / f"{number:03d}.md").write_text(text)
    folder = tmp_path / "data"
    result = command("corpus=text_folder", f"corpus.path={corpus}", f"output_dir={folder}",
                     f"tokenizer.path={tokenizer_path}", "sequence_length=64")  # fmt: skip
    assert result.code == 0, result.err
    manifest = Manifest.load(folder)
    assert manifest.train.documents + manifest.heldout.documents == files
    assert 0 < manifest.heldout.documents < files / 4


def test_what_is_held_out_where_nothing_is_said():
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("prepare", ["output_dir=x"])
    settings = PrepareSettings.from_config(cfg)
    shares = [settings.for_corpus(size).heldout_fraction for size in (0, 10**5, 10**6, 10**8)]
    assert shares == [0.1, 0.1, 0.05, 0.01]
    given = replace(settings, heldout_fraction=0.3)
    assert given.for_corpus(10**5) is given


def test_a_set_of_its_own_is_held_out(command, overrides, write_corpus, texts, tmp_path):
    """And is all that is held out; files of the two that have one name are told apart."""
    plain = [option for option in overrides if not option.startswith("heldout_fraction")]
    paths = [tmp_path / split / "text.jsonl" for split in ("train", "heldout")]
    short = [f"{number} {text[:60]}" for number, text in enumerate(texts)]
    for path, part in zip(paths, (short[:60], short[60:]), strict=True):
        path.parent.mkdir()
        write_corpus(path, part)
    folder = tmp_path / "data"
    options = [*plain, f"corpus.path={paths[0]}", f"heldout_path={paths[1].parent}",
               "dedup.exact=true", f"output_dir={folder}"]  # fmt: skip
    result = command(*options)
    assert result.code == 0, result.err
    assert sorted(texts_of(folder, "train")) == sorted(short[:60])
    assert sorted(texts_of(folder, "heldout")) == sorted(short[60:])
    assert command("verify=true", f"output_dir={folder}").code == 0
    (paths[1].parent / "more.jsonl").write_text('{"id": "x", "text": "more"}\n')
    assert "its corpus is no longer what it was made from" in command(*options).out


def test_nothing_is_held_out_where_that_is_said(command, overrides, texts, tmp_path):
    folder = tmp_path / "data"
    result = command(*overrides, "heldout_fraction=0", f"output_dir={folder}")
    assert result.code == 0, result.err
    assert "heldout: 0 documents" in result.out
    assert Manifest.load(folder).train.documents == len(texts)
    assert texts_of(folder, "heldout") == []
    for look in ("verify=true", "stats=true"):
        result = command(look, f"output_dir={folder}")
        assert (result.code, result.err) == (0, "")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_changed_corpus_is_not_mixed_in(
    command, overrides, prepared, tmp_path, texts, write_corpus, workers
):
    """The folder of an unfinished run over another text: the shards are all written anew."""
    folder, path = tmp_path / "data", tmp_path / "text.jsonl"
    options = [*overrides, f"corpus.path={path}", f"output_dir={folder}", f"workers={workers}"]
    write_corpus(path, texts)
    assert command(*options).code == 0
    first = Manifest.load(folder)
    (folder / "manifest.json").unlink()
    write_corpus(path, [text.replace("e", "E") for text in texts])
    assert command(*options).code == 0
    second = Manifest.load(folder)
    assert command(*options, f"output_dir={tmp_path / 'fresh'}").code == 0
    assert content(folder) == content(tmp_path / "fresh")
    hashes = [{s.sha256 for s in manifest.train.shards} for manifest in (first, second)]
    assert not hashes[0] & hashes[1]
    assert command("verify=true", f"output_dir={folder}").code == 0


def test_another_preparation_in_the_same_folder_is_refused(command, overrides, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        result = command(*overrides, f"output_dir={folder}")
    finally:
        os.close(descriptor)
    assert result.code == 2
    assert "another tidar-prepare writes" in result.err
    assert command(*overrides, f"output_dir={folder}").code == 0


@pytest.mark.parametrize(
    ("corpus", "text"),
    [
        ([], "corpus: holds no text (no documents); give another"),
        ([""], "corpus: holds no text (1 empty); give another"),
        (["a", "b"], "heldout_fraction: none of 2 documents fell into the heldout split"),
    ],
)
def test_too_little_text_is_named_and_leaves_no_manifest(
    command, overrides, tmp_path, write_corpus, corpus, text
):
    path = write_corpus(tmp_path / "text.jsonl", corpus)
    result = command(*overrides, f"corpus.path={path}", f"output_dir={tmp_path / 'data'}")
    assert result.code == 2
    assert text in result.err
    assert not (tmp_path / "data" / "manifest.json").exists()


def test_a_full_disk_is_one_line(command, overrides, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    result = command(*overrides, f"output_dir={tmp_path / 'data'}")
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert f"output_dir: {tmp_path / 'data'} cannot be written (No space left" in result.err
    assert not list((tmp_path / "data").rglob("*.tar"))


def test_a_huggingface_tokenizer_from_its_folder(command, overrides, tmp_path, texts):
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(texts[:20], trainer)
    source = tmp_path / "base"
    source.mkdir()
    model.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    kept = [one for one in overrides if not one.startswith("tokenizer.")]
    for folder, workers in (("one", 1), ("two", 2)):
        result = command(
            *kept, "tokenizer=huggingface", f"tokenizer.path={source}", f"workers={workers}",
            f"output_dir={tmp_path / folder}",
        )  # fmt: skip
        assert result.code == 0, result.err
    assert content(tmp_path / "one") == content(tmp_path / "two")
    info = Manifest.load(tmp_path / "one").tokenizer
    assert (info.kind, info.eos_id, info.mask_id, info.vocab_size) == ("huggingface", 1, 400, 401)
    pieces = {piece for split in SPLITS for piece in texts_of(tmp_path / "one", split)}
    encode = load_tokenizer(tmp_path / "one").encode
    short = {text for text in texts if len(encode(text)) < 128}
    assert short
    assert short <= pieces
    assert command("verify=true", f"output_dir={tmp_path / 'one'}").code == 0
