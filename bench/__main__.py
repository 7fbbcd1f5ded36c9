"""`python -m bench`: run benchmarks, print their tables, write `bench/results/*.json`."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import torch

from bench import attention, data, decode, head_loss, train_step
from bench.options import add_options, given_options
from bench.results import RESULTS, Bench, table, write
from tidar_common.cli import telling_mistakes
from tidar_common.errors import UserError

BENCHMARKS: dict[str, ModuleType] = {
    "train_step": train_step,
    "attention": attention,
    "head_loss": head_loss,
    "decode": decode,
    "data": data,
}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; python -m bench --help lists what there is")


def make_parser(names: Sequence[str]) -> argparse.ArgumentParser:
    """The options of every benchmark, or those of the one that is named."""
    parser = Parser(
        prog="python -m bench",
        description="Run all benchmarks, or one with options of its own.",
        epilog="python -m bench NAME --help lists the options of NAME.",
        allow_abbrev=False,
    )
    parser.add_argument("name", nargs="?", help=f"one of {', '.join(BENCHMARKS)}; none runs all")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--rounds", type=int, default=7, help="times each variant runs (7)")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before those that count (2)")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU (1)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the JSON files")
    for name in names:
        add_options(parser, name, BENCHMARKS[name].Options)
    return parser


def open_device(name: str) -> torch.device:
    """The device called `name`; raises UserError when there is none."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device: unknown value {name!r}; known are cpu and cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device: {name!r} is not supported; known are cpu and cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device: {name} is not on this machine; use --device cpu")
    return device


def run(arguments: Sequence[str]) -> None:
    """Run what the command line asks for; raises UserError for a bad argument."""
    named = [word for word in arguments if word in BENCHMARKS][:1]
    parsed = make_parser(named).parse_args(arguments)
    if parsed.name is not None and parsed.name not in BENCHMARKS:
        raise UserError(f"{parsed.name}: no such benchmark; known are {', '.join(BENCHMARKS)}")
    if parsed.rounds < 1 or parsed.warmup < 0 or parsed.threads < 1:
        raise UserError("--rounds and --threads must be at least 1, --warmup at least 0")
    device = open_device(parsed.device)
    torch.set_num_threads(parsed.threads)
    for name in [parsed.name] if parsed.name else BENCHMARKS:
        module = BENCHMARKS[name]
        options = given_options(parsed, module.Options) if parsed.name else module.Options()
        print(f"{name}: {first_line(module)}", flush=True)
        bench = Bench(device, parsed.rounds, parsed.warmup)
        module.run(options, bench)
        content = {"options": asdict(options), **asdict(bench.outcome)}
        path = write(name, device, parsed.results, "bench", **content)
        print(f"{table(bench.outcome)}\n{path}\n", flush=True)


def first_line(module: ModuleType) -> str:
    return (module.__doc__ or "").strip().splitlines()[0]


@telling_mistakes
def main(arguments: Sequence[str] | None = None) -> None:
    run(sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    sys.exit(main())
