"""Rules, evals and copies in a whole preparation: what goes is counted, listed, and the same
however the work is divided."""

import json
import re
import socket
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest

pytest.importorskip("datatrove")

from data_prep.filters import config as filter_config
from data_prep.filters.config import (
    C4Rules,
    FiltersConfig,
    FineWebRules,
    QualityRules,
    RepetitionRules,
)
from data_prep.filters.rules import Rules
from data_prep.filters.words import plain_words
from data_prep.formats.manifest import CONTAMINATED, Manifest

PROSE = (
    "The miller had risen before dawn, and his wagon stood loaded at the gate of the yard. "
    "Rain was falling on the road to town; nobody else would travel in that weather. "
    "His daughter carried a lantern with her and held it high above the horses. "
    "They crossed the old bridge slowly. Somewhere below, water roared against stone. "
    "By noon they reached the market, sold every sack of flour, and drank hot tea with friends."
)
QUESTION = "How many wagons does a miller need to bring forty barrels of oil to market by noon?"
EVERYTHING = FiltersConfig(RepetitionRules(), QualityRules(), C4Rules(), FineWebRules())


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (PROSE, None),
        ("!!! ??? ...", "repetition: top_2_gram"),
        (" \n\t ", "no words"),
        (" ".join(PROSE.split()[:40]), "quality: short_doc"),
        ("the same line\n" * 40, "repetition: dup_line_frac"),
        (PROSE.replace(" the ", " # "), None),
        (PROSE.replace(" ", "# ", 20), "quality: too_many_hashes"),
        (PROSE + " {", "c4: curly_bracket"),
        (PROSE.replace(".", ","), "c4: too_few_sentences"),
        (PROSE.replace(". ", ". And so on\n")[:-1], "fineweb: line_punct_ratio"),
    ],
)
def test_the_rule_that_is_broken_is_named(text, rule):
    assert Rules(EVERYTHING).broken_by(text) == rule


def test_a_threshold_can_be_moved_or_switched_off():
    short = PROSE[:100]
    assert Rules(FiltersConfig(quality=QualityRules(min_doc_words=10))).broken_by(short) is None
    assert Rules(FiltersConfig(quality=QualityRules(min_doc_words=None))).broken_by(short) is None
    assert Rules(FiltersConfig()).broken_by(" ") is None


def test_words_and_sentences_need_no_model():
    words = plain_words()
    assert "|".join(words.word_tokenize("Don't say 你好, a_b!")) == "Don't|say|你|好|,|a_b|!"
    text = 'He said "no." Then? 你好。好\nlast line'
    assert words.sent_tokenize(text) == ['He said "no."', "Then?", "你好。", "好", "last line"]


def random_prose(rng, count):
    """`count` documents of sentences of random words, of different lengths."""
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(rng.choice(letters, int(n))) for n in rng.integers(3, 9, 400)]
    return [
        " ".join(
            "The " + " ".join(rng.choice(words, 12)) + " and to that."
            for _ in range(int(rng.integers(5, 9)))
        )
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def removed():
    """What is to be removed: by id, the rule."""
    return {
        "d5": "quality: short_doc",
        "d9": "quality: short_doc",
        "d20": "duplicate: exact",
        "d21": "duplicate: minhash",
        "d30": "contaminated: millers",
    }


@pytest.fixture(scope="module")
def arguments(removed, write_corpus, tokenizer_path, tmp_path_factory):
    """The command that prepares 48 documents in several tasks, of which some are to go.

    One task's rules, copies and evals must not depend on another's.
    """
    folder = tmp_path_factory.mktemp("filtered")
    texts = random_prose(np.random.default_rng(0), 48)
    texts[5] = texts[9] = "too short"
    texts[21] = texts[4] + " A few words more."
    texts[20] = texts[3]
    half = len(texts[30]) // 2
    texts[30] = f"{texts[30][:half]} {QUESTION.upper()} {texts[30][half:]}"
    path = write_corpus(folder / "text.jsonl", texts)
    (folder / "millers.jsonl").write_text(
        json.dumps({"question": {"text": QUESTION}, "choices": ["2", "4"], "answer": 1}) + "\n"
    )
    return [
        "corpus=jsonl",
        f"corpus.path={path}",
        "corpus.id_field=id",
        f"tokenizer.path={tokenizer_path}",
        "sequence_length=128",
        "layout.block_size=8",
        "heldout_fraction=0.2",
        "task_bytes=6000",
        "filters=gopher",
        "filters.repetition=null",
        "dedup.exact=true",
        "dedup.minhash=true",
        f"decontaminate.evals={{millers:{folder / 'millers.jsonl'}}}",
    ]


def files_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def prepared(arguments, tmp_path_factory):
    from hydra import compose, initialize_config_dir

    from data_prep.prepare import prepare
    from tidar_common.cli import config_dir

    folder = tmp_path_factory.mktemp("whole") / "data"
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        assert prepare(compose("prepare", [*arguments, f"output_dir={folder}"])) == 0
    return folder


def test_every_document_is_accounted_for(prepared, removed):
    manifest = Manifest.load(prepared)
    expected: dict[str, int] = {}
    for rule in removed.values():
        expected[rule] = expected.get(rule, 0) + 1
    assert manifest.documents == {
        "read": 48,
        "packed": 48 - len(removed),
        "filtered": dict(sorted(expected.items())),
        "refused": {},
    }
    assert manifest.filters["evals"]["millers"]["texts"] == 3
    assert manifest.filters["evals"]["millers"]["too_short"] == 2


def test_what_held_an_eval_is_listed(prepared):
    (line,) = (prepared / CONTAMINATED).read_text().splitlines()
    assert json.loads(line) == {
        "id": "d30",
        "rule": "contaminated: millers",
        "eval": "millers",
        "ngram": "how many wagons does a miller need to bring forty barrels of oil",
    }


def test_verify_and_stats_know_the_filters(prepared, command, tmp_path):
    assert command("verify=true", f"output_dir={prepared}").code == 0
    copy = tmp_path / "copy"
    for name, content in files_of(prepared).items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(content)
    said = command("stats=true", f"output_dir={copy}").out  # which adds a page to the folder
    assert "By rule or reason, of 48 documents read" in said
    assert re.search(r"filtered: quality: short_doc +2 ", said), said
    (copy / CONTAMINATED).write_text("{}\n")
    result = command("verify=true", f"output_dir={copy}")
    assert result.code == 2
    assert CONTAMINATED in result.err


def test_workers_and_jobs_do_not_change_the_output(prepared, arguments, command, tmp_path):
    assert command(*arguments, "workers=2", f"output_dir={tmp_path / 'two'}").code == 0
    assert files_of(tmp_path / "two") == files_of(prepared)
    jobs = [
        command(*arguments, f"array={number}/2", f"output_dir={tmp_path / 'jobs'}").out
        for number in (0, 1, 0)
    ]
    assert "are screened; when all are, start the same jobs once more" in jobs[0]
    assert "tasks are done; the job that does the last one" in jobs[1]
    assert files_of(tmp_path / "jobs") == files_of(prepared)


@pytest.mark.parametrize("place", ["screen_task", "find_copies", "run_task"])
def test_an_interrupted_screening_goes_on(
    prepared, arguments, command, tmp_path, monkeypatch, place
):
    from data_prep import prepare as entry_point
    from data_prep.stages import screen

    module = entry_point if place == "run_task" else screen
    real, calls = getattr(module, place), []

    def dies(*given):
        calls.append(given)
        if len(calls) == (1 if place == "find_copies" else 3):
            raise KeyboardInterrupt
        real(*given)

    output = f"output_dir={tmp_path / 'data'}"
    with monkeypatch.context() as patched:
        patched.setattr(module, place, dies)
        assert command(*arguments, output).code == 130
    again = []
    judge = screen.screen_task

    def counted(task, *given):
        again.append(task)
        judge(task, *given)

    monkeypatch.setattr(screen, "screen_task", counted)
    assert command(*arguments, output).code == 0
    assert files_of(tmp_path / "data") == files_of(prepared)
    assert bool(again) == (place == "screen_task")


def test_an_eval_that_changed_is_looked_for_anew(arguments, command, tmp_path):
    evals = tmp_path / "other.jsonl"
    evals.write_text(json.dumps({"text": QUESTION}) + "\n")
    given = [*arguments[:-1], f"decontaminate.evals={{other:{evals}}}"]
    first = command(*given, "array=0/2", f"output_dir={tmp_path / 'data'}").out
    assert "tasks are screened" in first
    evals.write_text(json.dumps({"text": "words " * 20}) + "\n")
    said = command(*given, f"output_dir={tmp_path / 'data'}").out
    assert "contaminated" not in said
    assert (tmp_path / "data" / CONTAMINATED).read_text() == ""


def test_a_mix_removes_the_same_in_every_epoch(
    write_corpus, tokenizer_path, command, tmp_path
):  # fmt: skip
    rng = np.random.default_rng(1)
    small, large = random_prose(rng, 12), random_prose(rng, 40)
    small[2] = "too short"
    large[7] = small[6]
    (tmp_path / "s").mkdir()
    (tmp_path / "l").mkdir()
    write_corpus(tmp_path / "s" / "a.jsonl", small)
    write_corpus(tmp_path / "l" / "b.jsonl", large)
    place = "kind:jsonl,path:" + str(tmp_path)
    result = command(
        "corpus=mix",
        f"corpus.sources={{s:{{{place}/s,weight:0.5}},l:{{{place}/l,weight:0.5}}}}",
        f"tokenizer.path={tokenizer_path}",
        "filters={quality:{min_doc_words:20}}",
        "dedup.minhash=true",
        "sequence_length=64",
        "heldout_fraction=0.1",
        "task_bytes=4000",
        f"output_dir={tmp_path / 'data'}",
    )
    assert result.code == 0, result.err
    manifest = Manifest.load(tmp_path / "data")
    epochs = manifest.sources["s"]["epochs"]
    assert epochs > 2
    filtered = manifest.documents["filtered"]
    assert int(epochs) <= filtered["quality: short_doc"] <= int(epochs) + 1
    assert 1 <= filtered["duplicate: minhash"] <= int(epochs) + 1
    assert command("verify=true", f"output_dir={tmp_path / 'data'}").code == 0


def test_nothing_is_fetched(arguments, command, tmp_path, monkeypatch):
    def refuse(*given, **named):
        raise AssertionError("a connection is opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    given = [*arguments, "filters=fineweb", "filters.fineweb.short_line_thr=0.9"]
    given.remove("filters.repetition=null")
    given.remove("filters=gopher")
    result = command(*given, f"output_dir={tmp_path / 'data'}")
    assert result.code == 0, result.err
    assert "filtered: 2 documents, repetition:" in result.out


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("filters.quality.min_words=3", "filters.quality.min_words"),
        ("filters.repetition={top_n_grams:[[2]]}", "filters.repetition.top_n_grams: [2] is not"),
        ("filters.repetition={dup_n_grams:[[a,1]]}", "filters.repetition.dup_n_grams: ['a', 1]"),
        ("dedup.num_buckets=0", "dedup.num_buckets: must be at least 1"),
        ("decontaminate.n_grams=0", "decontaminate.n_grams: must be at least 1"),
        ("decontaminate.evals.millers=/nowhere", "decontaminate.evals.millers: /nowhere"),
        ("decontaminate.fields=[nothing]", "has no field 'nothing'; set decontaminate.fields"),
        ("decontaminate.n_grams=40", "has no text of 40 words"),
        ("filters.quality.min_doc_words=100000", "no text is left"),
    ],
)
def test_mistakes_are_named(arguments, command, tmp_path, override, said):
    result = command(*arguments, override, f"output_dir={tmp_path / 'data'}")
    assert result.code == 2
    assert said in result.err
    assert result.err.count("\n") == 1


def test_a_missing_datatrove_is_named(arguments, command, tmp_path, monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(filter_config, "version", missing)
    result = command(*arguments, f"output_dir={tmp_path / 'data'}")
    assert result.code == 2
    assert "pip install 'tidar-pretrain[filters]'" in result.err
