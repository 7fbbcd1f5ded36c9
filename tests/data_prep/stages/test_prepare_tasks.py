"""Tasks: shared among jobs, done once, redone when what they were made from changed."""

import json
import threading

import numpy as np
import pytest
from omegaconf import OmegaConf
from test_prepare import content

from data_prep.corpora import open_corpus
from data_prep.formats.manifest import Manifest


def done_before(result):
    head, _, _ = result.out.partition(" tasks are done already")
    return int(head.splitlines()[-1].split(" of ")[0]) if head != result.out else 0


def files(path, texts, write_corpus):
    """The texts in several files, of which one can change without the others."""
    path.mkdir()
    for number in range(6):
        write_corpus(path / f"{number}.jsonl", [f"{number} {text}" for text in texts[number::6]])
    return path


@pytest.mark.parametrize("jobs", [2, 5])
def test_an_array_of_jobs_gives_what_one_gives(command, overrides, prepared, tmp_path, jobs):
    """In any order, one after another; the last one puts the folder together."""
    folder = tmp_path / "data"
    for job in reversed(range(jobs)):
        result = command(*overrides, f"output_dir={folder}", f"array={job}/{jobs}")
        assert result.code == 0, result.err
        assert (folder / "manifest.json").exists() == (job == 0)
        assert ("the job that does the last one" in result.out) == (job > 0)
    assert content(folder) == content(prepared)
    again = command(*overrides, f"output_dir={folder}", f"array=0/{jobs}")
    assert "is prepared with these settings already" in again.out


def test_another_number_of_jobs_continues(command, overrides, prepared, tmp_path):
    """As when some jobs of the array never came to their end."""
    folder = tmp_path / "data"
    assert command(*overrides, f"output_dir={folder}", "array=0/3").code == 0
    result = command(*overrides, f"output_dir={folder}")
    assert result.code == 0
    assert done_before(result) > 0
    assert content(folder) == content(prepared)


def test_more_jobs_than_tasks_are_refused(command, overrides, tmp_path):
    result = command(*overrides, f"output_dir={tmp_path / 'data'}", "array=0/1000")
    assert result.code == 2
    assert "array: 1000 jobs, but the corpus makes only" in result.err
    assert not (tmp_path / "data").exists()


def test_jobs_and_a_preparation_alone_do_not_mix(command, overrides, tmp_path):
    import fcntl
    import os

    folder = tmp_path / "data"
    folder.mkdir()
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    try:
        alone = command(*overrides, f"output_dir={folder}")
        job = command(*overrides, f"output_dir={folder}", "array=0/2")
    finally:
        os.close(descriptor)
    assert alone.code == 2
    assert "another tidar-prepare writes" in alone.err
    assert job.code == 0


@pytest.mark.parametrize("change", ["a file", "the config", "the tokenizer", "nothing"])
def test_a_task_is_done_again_only_when_its_input_changed(
    command, overrides, tmp_path, texts, write_corpus, tokenizer_path, change
):
    corpus, folder, own = tmp_path / "text", tmp_path / "data", tmp_path / "tokenizer.model"
    files(corpus, texts, write_corpus)
    own.write_bytes(tokenizer_path.read_bytes())
    options = [*overrides, f"corpus.path={corpus}", f"output_dir={folder}", "task_bytes=40000",
               f"tokenizer.path={own}"]  # fmt: skip
    first = command(*options, "array=0/2")
    assert first.code == 0
    tasks = len(list((folder / "tasks").glob("[0-9]*.json")))
    if change == "a file":
        write_corpus(corpus / "3.jsonl", [f"3 {text} and more" for text in texts[3::6]])
    elif change == "the config":
        options.append("seed=5")
    elif change == "the tokenizer":
        from data_prep.tokenizers.train import train_sentencepiece

        own.write_bytes(train_sentencepiece(texts, 590, "bpe", 60_000, seed=1).content())
    second = command(*options)
    assert second.code == 0, second.err
    done = done_before(second)
    expected = {"a file": range(1, tasks), "nothing": [tasks]}.get(change, [0])
    assert done in expected
    fresh = command(*options, f"output_dir={tmp_path / 'fresh'}")
    assert fresh.code == 0
    assert content(folder) == content(tmp_path / "fresh")
    assert command("verify=true", f"output_dir={folder}").code == 0


@pytest.mark.parametrize("damage", ["record", "shard", "rests"])
def test_what_a_task_left_must_be_whole(command, overrides, prepared, tmp_path, damage):
    folder = tmp_path / "data"
    assert command(*overrides, f"output_dir={folder}", "array=0/2").code == 0
    place = folder / "tasks"
    if damage == "record":
        (place / "000000.json").write_text("{")
    elif damage == "rests":
        (place / "000000.rests").unlink()
    else:
        next(iter(sorted(place.glob("*.tar")))).write_bytes(b"half")
    assert command(*overrides, f"output_dir={folder}").code == 0
    assert content(folder) == content(prepared)


@pytest.mark.parametrize("moves", [0, 1, 7])
def test_killed_while_shards_are_moved_it_goes_on(
    command, overrides, prepared, tmp_path, monkeypatch, moves
):
    import os

    folder, left = tmp_path / "data", [moves]
    replace = os.replace

    def killed(source, target):
        if os.path.basename(os.path.dirname(target)) == "train":
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        assert command(*overrides, f"output_dir={folder}").code == 130
    assert len(list((folder / "train").glob("*.tar"))) == moves
    assert not (folder / "manifest.json").exists()
    result = command(*overrides, f"output_dir={folder}")
    assert result.code == 0
    assert content(folder) == content(prepared)
    tasks = result.out.partition(" tasks are done already")[0].split(" of ")
    assert tasks[0] == tasks[1], "no task is done again"


def test_jobs_at_the_same_time(overrides, prepared, tmp_path):
    """Three processes on one folder, started together."""
    import subprocess
    import sys

    from commands import ROOT

    folder = tmp_path / "data"
    codes = [None] * 3

    def job(number):
        done = subprocess.run(
            [sys.executable, "-m", "data_prep.prepare", *overrides, f"output_dir={folder}",
             f"array={number}/3"], cwd=ROOT, capture_output=True, text=True, timeout=120,
            check=False,
        )  # fmt: skip
        codes[number] = (done.returncode, done.stderr)

    threads = [threading.Thread(target=job, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [(0, "")] * 3
    assert content(folder) == content(prepared)


def test_a_task_takes_text_from_all_over_the_corpus(corpus_path, command, overrides, tmp_path):
    """Neighbours of a shard are no neighbours of the corpus."""
    lines = [json.dumps({"id": str(n), "text": f"{n} "}) for n in range(3000)]
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(lines) + "\n")
    folder = tmp_path / "data"
    assert command(*overrides, f"corpus.path={path}", f"output_dir={folder}").code == 0
    from test_prepare import texts_of

    numbers = [int(text) for text in texts_of(folder, "train")][:200]
    assert max(numbers) - min(numbers) > 1000


def test_parts_are_the_whole_corpus_however_they_are_cut(corpus_path, texts):
    """Every document once, in order, for parts of any size, also below that of a line."""
    section = OmegaConf.create({"kind": "jsonl", "path": str(corpus_path), "id_field": "id"})
    corpus = open_corpus(section)
    whole = list(corpus.documents())
    assert len(whole) == len(texts)
    for size in (10, 1000, 30_000, 10**9):
        parts = corpus.parts(size)
        assert [one for part in parts for one in corpus.documents([part])] == whole
        assert sum(part.bytes for part in parts) == corpus.total_bytes
    records = [json.loads(line) for line in corpus_path.read_text().splitlines()]
    assert [one.text for one in whole] == [record["text"] for record in records]


def test_line_numbers_are_right_in_a_later_part(corpus_path, tmp_path, command, overrides):
    lines = corpus_path.read_text().splitlines()
    lines[60] = lines[60][:-1]
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(lines) + "\n")
    for workers in (1, 2):
        result = command(*overrides, f"corpus.path={path}", f"output_dir={tmp_path / 'data'}",
                         f"workers={workers}")  # fmt: skip
        assert result.code == 2
        assert f"{path}:61: not JSON" in result.err


def test_rests_of_all_tasks_are_packed_together(prepared):
    """Small tasks would leave a sequence half empty each."""
    manifest = Manifest.load(prepared)
    assert manifest.train.padding < 0.03 * manifest.train.tokens
    assert manifest.train.padding < 3 * manifest.sequence_length
    index = np.load(prepared / "shard_index.npy")
    assert len(index) == sum(
        manifest.groups(shard) + 1 for split in manifest.splits.values() for shard in split.shards
    )


@pytest.mark.parametrize("mixed", [False, True])
def test_a_trained_tokenizer_is_trained_once(command, overrides, tmp_path, mixed, corpus_path):
    """By the first job of an array, or before an interruption; other text trains it again."""
    own = [one for one in overrides if not one.startswith(("tokenizer", "corpus"))]
    source = f"kind:jsonl,path:{corpus_path}"
    corpus = ["corpus=jsonl", f"corpus.path={corpus_path}"]
    if mixed:
        corpus = [
            "corpus=mix",
            f"corpus.sources={{a:{{{source},weight:2}},b:{{{source},weight:3}}}}",
        ]
    options = [*own, *corpus, "tokenizer.vocab_size=500", f"output_dir={tmp_path / 'data'}"]
    first, second = (command(*options, f"array={job}/2") for job in range(2))
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert "training a SentencePiece model" in first.out
    assert "training a SentencePiece model" not in second.out
    assert command("verify=true", f"output_dir={tmp_path / 'data'}").code == 0
