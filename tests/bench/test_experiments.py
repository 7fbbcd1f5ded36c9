"""Experiments: held-out text that training does not hold, equal budgets, and runs that resume."""

import json
import random
from dataclasses import replace
from itertools import pairwise

import pytest

from bench.experiments import corpus as corpora
from bench.experiments import study as studies
from bench.experiments.__main__ import jobs, main
from bench.experiments.corpus import CORPORA, NGRAM, ngrams, write_corpus
from bench.experiments.runs import BY_NAME, HEADLINE_SEEDS, RUNS
from bench.experiments.study import DONE, Budgets, Study
from data_prep.config import in_heldout
from data_prep.corpora.files import local_file
from data_prep.corpora.text_files import FilesCorpus
from tidar_common.errors import UserError

FRACTION = 0.3
SMALL = (
    "model.hidden_size=32", "model.intermediate_size=48", "model.num_layers=1",
    "model.num_heads=2", "model.num_kv_heads=1", "model.head_dim=16",
    "evals.decode_speed.prompt_tokens=8",
)  # fmt: skip
QUICK = (
    "evals.decode_speed.prompts=1", "evals.decode_speed.prompt_tokens=8",
    "evals.decode_speed.max_new_tokens=4", "evals.decode_speed.score_sequences=2",
    "evals.likelihood.sequences=2",
)  # fmt: skip


def test_heldout_files_that_training_holds_are_dropped(tmp_path, monkeypatch):
    """Against a comparison of n-grams as lists of words, file by file."""
    rng = random.Random(0)
    words = [f"w{n}" for n in range(200)]
    texts = {f"m{n}.py": " ".join(rng.choices(words, k=60)) for n in range(40)}
    held = [name for name in texts if in_heldout(name, seed=0, fraction=FRACTION)]
    train = [name for name in texts if name not in held]
    copied, partly, touched = held[:3]
    texts[copied] = texts[train[0]]
    # 60 words have 48 n-grams; 30 copied words hold 18 of them, 14 hold 2.
    texts[partly] = " ".join([*texts[train[1]].split()[:30], *texts[partly].split()[:30]])
    texts[touched] = " ".join([*texts[train[2]].split()[:14], *texts[touched].split()[:46]])
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    files = [local_file(tmp_path / name, name) for name in texts]
    monkeypatch.setattr(corpora, "open_sources", lambda choice: FilesCorpus(files))
    choice = replace(CORPORA["stdlib"], heldout_fraction=FRACTION)
    about = write_corpus(choice, tmp_path / "out.jsonl")

    def grams(text: str) -> set[tuple[str, ...]]:
        found = text.split()
        return {tuple(found[i : i + NGRAM]) for i in range(len(found) - NGRAM + 1)}

    in_train = set().union(*(grams(texts[name]) for name in train))
    dropped = {n for n in held if len(grams(texts[n]) & in_train) > 0.1 * len(grams(texts[n]))}
    assert dropped == {copied, partly}
    kept = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {row["id"]: row["text"] for row in kept} == {
        name: text for name, text in texts.items() if name not in dropped
    }
    left = set().union(*(grams(texts[name]) for name in held if name not in dropped))
    assert about["heldout_dropped"] == 2
    assert about["heldout_documents"] == len(held) - 2
    assert about["heldout_ngrams_shared"] == len(left & in_train) / len(left)


def test_words_and_signs_count():
    code = "def f(a):\n    return a + 1  # the same, with other spaces"
    assert ngrams(code) == ngrams(" ".join(code.split())) != ngrams(code.replace("+", "-"))
    assert ngrams("a b c") == set()


def test_the_installed_corpus_holds_the_library_and_packages():
    names = [file.name for file in corpora.open_sources(CORPORA["installed"]).files]
    assert {"json/decoder.py", "site-packages/hydra/main.py"} <= set(names)
    assert not any("/tests/" in name or "__pycache__" in name for name in names)


def test_budgets_are_equal(data_dir):
    """Compute to half a step, tokens exactly, and the runs from scratch pay for their start."""
    budgets = Budgets(data_dir, scale=0.1)
    cost = {run.name: budgets.flops_per_step(run) for run in RUNS}
    steps = {run.name: budgets.steps(run) for run in RUNS}
    allowed = cost["published"] * steps["published"]
    for run in RUNS:
        if run.budget in ("compute", "total"):
            whole = allowed + cost["base"] * steps["base"] * (run.budget == "total")
            assert abs(cost[run.name] * steps[run.name] - whole) <= cost[run.name] / 2
    assert steps["ar_tokens"] == steps["published"] == 40
    assert steps["ar_tokens_50"] == steps["kl_early_50"]
    assert cost["ar_tokens"] < cost["coverage_25"] < cost["coverage_50"] < cost["published"]
    assert cost["published"] < cost["kl"] == cost["tv"]


def test_the_headline_has_every_seed_and_starts_come_first():
    wanted = jobs(None, None)
    for run in RUNS:
        seeds = [seed for other, seed in wanted if other is run]
        assert seeds == list(HEADLINE_SEEDS if run.headline else HEADLINE_SEEDS[:1])
    for number, (run, seed) in enumerate(wanted):
        if run.start is not None:
            assert (BY_NAME[run.start], seed) in wanted[:number]
            assert BY_NAME[run.start].headline or not run.headline
    assert all(a != b for a, b in pairwise(wanted))
    assert jobs(["shift", "tv"], [5]) == [(BY_NAME["shift"], 5), (BY_NAME["tv"], 5)]


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Study:
    folder = tmp_path_factory.mktemp("study")
    choice = replace(
        CORPORA["stdlib"], heldout_fraction=0.3, sequence_length=64, vocab_size=400,
        max_bytes=300_000,
    )  # fmt: skip
    return Study(choice, folder / "work", folder / "results", SMALL, QUICK, scale=0.00625)


def test_a_run_is_trained_scored_and_not_done_twice(study, monkeypatch):
    """Killed before its scores it goes on with them; finished it stays; changed it is done anew."""
    commands = []
    real = studies.execute

    def counted(module: str, words: list[str]) -> None:
        commands.append(module)
        if module == "pipeline.evaluate" and len(commands) == 2:
            raise UserError("killed")
        real(module, words)

    monkeypatch.setattr(studies, "execute", counted)
    base = [(BY_NAME["base"], 0)]
    with pytest.raises(UserError, match="killed"):
        study.perform(base, print)
    with pytest.raises(UserError, match=r"published: starts from base with seed 0, which is not"):
        study.perform([(BY_NAME["published"], 0)], print)
    (path,) = study.perform(base, print)
    assert commands == ["pipeline.train", "pipeline.evaluate"] * 2
    result = json.loads(path.read_text())
    assert study.perform(base, print) == [path]
    assert len(commands) == 4
    run_dir = study.run_dir(BY_NAME["base"], 0)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, result["steps"] + 1))
    assert result["steps"] == 10
    assert result["clean_tokens"] == rows[-1]["tokens"] > 0
    assert result["corpus"] == json.loads((study.folder / "text.json").read_text())
    (score,) = result["scores"]
    whole = json.loads((run_dir / "scores.json").read_text())
    assert score["bits_per_byte"] == whole["likelihood"]["bits_per_byte"]
    assert score["greedy"]["tokens_per_forward"] == 1.0
    assert json.loads((run_dir / DONE).read_text()) == result["commands"]


@pytest.mark.long
def test_a_mixed_run_is_scored_at_each_block_length(study):
    study.perform([(BY_NAME["base"], 0)], print)
    (path,) = study.perform([(BY_NAME["mixed"], 0)], print)
    result = json.loads(path.read_text())
    assert [score["block_size"] for score in result["scores"]] == [4, 8, 16]
    for score in result["scores"]:
        sampled = score["sampled"]
        assert 1.0 <= sampled["expected_tokens_per_forward"] <= score["block_size"]
        assert len(sampled["unigram_acceptance"]) == score["block_size"] - 1
        for draft in ("unigram", "bigram"):
            assert 1.0 <= sampled[f"{draft}_expected_tokens_per_forward"] <= score["block_size"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nope"], "--only: no run named 'nope'; known are base, ar_tokens"),
        (["--scale", "0"], "--scale: must be above 0"),
        (["--corpus", "web"], "argument --corpus: invalid choice: 'web'"),
    ],
)
def test_a_bad_argument_is_one_line(arguments, message, capsys):
    assert main([*arguments, "--list"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_the_list_shows_commands_that_can_be_repeated(capsys):
    assert main(["--list"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("tidar-train experiment=study") == len(jobs(None, None))
    assert "layout.block_sizes=[4,8,16]" in shown.replace("'", "")
