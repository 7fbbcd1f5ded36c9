"""`python -m bench.experiments`: train and score the runs that are not done yet."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.__main__ import Parser
from bench.experiments.corpus import CORPORA
from bench.experiments.runs import HEADLINE_SEEDS, RUNS, Run, find_run
from bench.experiments.study import Study
from bench.results import RESULTS
from tidar_common.cli import telling_mistakes
from tidar_common.errors import UserError


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m bench.experiments", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--corpus", default="stdlib", choices=CORPORA,
        help="Python's standard library, or it and all Python sources installed beside the project",
    )  # fmt: skip
    parser.add_argument("--only", nargs="+", metavar="RUN", help="these runs and no others")
    parser.add_argument("--seeds", nargs="+", type=int, help="these seeds for every run chosen")
    parser.add_argument("--list", action="store_true", help="print the runs, train nothing")
    parser.add_argument("--work", type=Path, default=Path("runs/experiments"),
                        help="folder for text, data and runs (runs/experiments)")  # fmt: skip
    parser.add_argument("--results", type=Path, default=RESULTS / "experiments",
                        help="folder for the JSON files")  # fmt: skip
    parser.add_argument("--scale", type=float, default=1.0, help="length of all runs (1)")
    parser.add_argument("--length", type=float, default=1.0,
                        help="length of all that start from base (1)")  # fmt: skip
    return parser


def jobs(only: list[str] | None, seeds: list[int] | None) -> list[tuple[Run, int]]:
    """The pairs of run and seed asked for: every run with the first seed, then the headline again
    with the others."""
    chosen = RUNS if only is None else tuple(map(find_run, only))
    if seeds is not None:
        return [(run, seed) for seed in seeds for run in chosen]
    first = [(run, HEADLINE_SEEDS[0]) for run in chosen]
    again = [(run, seed) for seed in HEADLINE_SEEDS[1:] for run in chosen if run.headline]
    return first + again


def run(arguments: Sequence[str]) -> None:
    """Do what the command line asks for; raises UserError for a bad argument or a failed run."""
    given = make_parser().parse_args(arguments)
    for name in ("scale", "length"):
        if getattr(given, name) <= 0:
            raise UserError(f"--{name}: must be above 0, got {getattr(given, name):g}")
    study = Study(
        CORPORA[given.corpus], given.work, given.results, scale=given.scale, length=given.length
    )
    wanted = jobs(given.only, given.seeds)
    if given.list:
        for study_run, seed in wanted:
            words = study.train_command(study_run, seed, steps=1)
            shown = shlex.join(word for word in words if not word.startswith("steps="))
            print(f"{study_run.name}, seed {seed}: {study_run.about}\n  tidar-train {shown}")
        return
    study.perform(wanted, lambda text: print(text, flush=True))


@telling_mistakes
def main(arguments: Sequence[str] | None = None) -> None:
    run(sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    sys.exit(main())
