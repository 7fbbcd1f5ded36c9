"""Sweeps: one command line with several values for a key, as a list of training runs.

`tidar-train -m objective.alpha=0.3,1 run_dir=runs/alpha …` trains them one after the other, each in
processes of its own. On Slurm they are an array, one task a run, and nothing waits on the login
node. For the job scripts:

    python -m tidar_common.sweep count OVERRIDE...          how many runs these are
    python -m tidar_common.sweep nth NUMBER OVERRIDE...     the overrides of one, a line each

Values are swept as by Hydra: `a=1,2`, `a=range(1,5)`, `a=choice(x,y)`; several keys give every
combination. Each run gets a folder of its own below `run_dir`, named by what it differs in.
"""

import re
import subprocess
import sys
from itertools import islice, product

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from tidar_common.cli import telling_mistakes
from tidar_common.errors import UserError
from tidar_common.overrides import unreadable
from tidar_common.run_files import Exit

FLAGS = ("-m", "--multirun")
RUN_DIR = "run_dir"


def expand(overrides: list[str]) -> list[list[str]]:
    """The overrides of each run, in a fixed order; one run where nothing is swept. Hydra's options
    (`--config-dir=DIR`) are every run's.

    Raises:
        UserError: for an override that cannot be read, or a sweep without `run_dir`.
    """
    fixed, swept = [], []
    words = iter(overrides)
    for text in words:
        if text.startswith("-"):
            fixed += [text] if "=" in text else [text, *islice(words, 1)]
            continue
        try:
            override = OverridesParser.create().parse_override(text)
            if override.is_sweep_override():
                key = override.get_key_element()
                swept.append([f"{key}={value}" for value in override.sweep_string_iterator()])
            else:
                fixed.append(text)
        except (HydraException, RuntimeError) as error:  # the latter for a kind it cannot list
            raise UserError(unreadable(text, error)) from error
    if not swept:
        return [fixed]
    below = [text for text in fixed if text.startswith(f"{RUN_DIR}=")]
    if not below:
        raise UserError("run_dir: has no value; a sweep makes a folder below it for each run")
    others = [text for text in fixed if text not in below]
    return [
        [*others, *choice, f"{below[-1].rstrip('/')}/{folder_name(choice)}"]
        for choice in product(*swept)
    ]


def folder_name(choice: tuple[str, ...]) -> str:
    """Letters that need no quotes anywhere: `objective.alpha-0.3_layout.block_size-8`."""
    return "_".join(re.sub(r"[^A-Za-z0-9._+-]+", "-", text.lstrip("+~")) for text in choice)


def train_each(overrides: list[str]) -> int:
    """Train the runs of a sweep one after the other; returns the first code that is not 0.

    A run that fails does not keep the others from starting; one that was stopped by a signal does.
    """
    runs = expand(overrides)
    first_failure = 0
    for number, run in enumerate(runs, 1):
        print(f"run {number} of {len(runs)}: {run[-1]}", flush=True)
        command = [sys.executable, "-m", "pipeline.train", *run]
        code = subprocess.run(command, check=False).returncode
        first_failure = first_failure or code
        if code == Exit.SAVED or code < 0:
            break
    return first_failure if first_failure >= 0 else 128 - first_failure


@telling_mistakes
def main(arguments: list[str]) -> None:
    match arguments:
        case ["count", *overrides]:
            print(len(expand(overrides)))
        case ["nth", number, *overrides]:
            runs = expand(overrides)
            if not number.isdigit() or int(number) >= len(runs):
                raise UserError(f"array task {number}: there are {len(runs)} runs, from 0 on")
            print("\n".join(runs[int(number)]))
        case _:
            raise UserError("usage: python -m tidar_common.sweep count|nth ...; see its docstring")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
