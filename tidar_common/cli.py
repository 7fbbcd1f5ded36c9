"""The shell around every entry point: Hydra, one-line errors, exit codes.

A command ends with the code that its task returns, or as `run_files.Exit` says for mistakes and
faults.
"""

import functools
import os
import re
import select
import shutil
import sys
import textwrap
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, ParamSpec

import hydra
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tidar_common import overrides, schema
from tidar_common.errors import UserError
from tidar_common.progress import doing
from tidar_common.run_files import Exit
from tidar_common.schema import Command

P = ParamSpec("P")
HELP_FLAGS = {"--help", "-h"}
VALUED_FLAGS = {
    "--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--cfg", "-c",
    "--package", "-p",
}  # fmt: skip
"""Hydra's, behind which a word of its own is the value."""


def config_dir() -> Path:
    """The folder with the Hydra configuration: `conf/` of the checkout, or the installed copy."""
    root = Path(__file__).resolve().parent.parent
    for candidate in (root / "conf", root / "pipeline" / "conf"):
        if (candidate / "experiment").is_dir():
            return candidate
    raise FileNotFoundError(f"no conf/ folder under {root}; reinstall tidar-pretrain")


def compose(name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The config of the command `name`; raises what Hydra does for overrides that are wrong."""
    schema.command(name)
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        return hydra.compose(name, list(overrides))


def run(
    config_name: str,
    task: Callable[[DictConfig], int | None],
    *,
    verbatim_keys: Collection[str] = (),
) -> int:
    """Compose `config_name` with the overrides in sys.argv, call `task(cfg)`, return an exit code.

    Where whoever reads the output ends first, as `head` does, so does the command, in silence.

    The values of `verbatim_keys` are taken letter for letter, whatever they mean to Hydra.

    Hydra's own error handling is switched off: it prints several lines and always exits with 1.
    """
    try:
        try:
            return _run(config_name, task, verbatim_keys)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _nobody_reads_stdout():
            raise
        # Or Python's own flush at the end would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.CLOSED_PIPE


def _run(
    config_name: str, task: Callable[[DictConfig], int | None], verbatim_keys: Collection[str]
) -> int:
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    words = [quote_verbatim(argument, verbatim_keys) for argument in sys.argv[1:]]
    flags, given = flags_apart(words)
    sys.argv[1:] = flags + given
    command = schema.command(config_name)
    codes: list[int] = []
    mistakes: list[str] = []
    closed: list[BrokenPipeError] = []
    composed = False

    def guarded(cfg: DictConfig) -> None:
        nonlocal composed
        composed = True
        try:
            overrides.refuse_unknown(cfg, command, given)
            codes.append(task(cfg) or 0)
        except (UserError, OmegaConfBaseException) as error:
            # Caught inside the job, or Hydra adds lines of its own before it passes it on.
            mistakes.append(overrides.one_line(error))
        except BrokenPipeError as error:
            if not _nobody_reads_stdout():
                raise
            closed.append(error)
        finally:
            doing("")

    try:
        if HELP_FLAGS & set(sys.argv[1:]):
            print("\n".join(help_lines(command, given)))
            return 0
        hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=config_name)(
            guarded
        )()
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if composed:
            raise
        mistakes.append(overrides.describe(error, command, given))
    if closed:
        raise closed[0]
    if mistakes:
        report_mistake(mistakes[0])
        return Exit.BAD_INPUT
    return max(codes, default=0)


def flags_apart(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Hydra's flags, whose parser finds none between overrides, and the overrides."""
    flags: list[str] = []
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        (flags if word.startswith("-") else rest).append(word)
        if word in VALUED_FLAGS:
            flags += islice(words, 1)
    return flags, rest


def help_lines(command: Command, given: Sequence[str]) -> Iterator[str]:
    """The help of a command: what it does, its groups, and a line for each key, with the value
    that it has with the overrides `given`."""
    width = shutil.get_terminal_size((100, 24)).columns
    yield command.about.strip("\n")
    chosen = overrides.chosen(command, given)
    if command.groups:
        yield "\nGroups (group=choice):"
    for group, usual in {**command.groups, **chosen}.items():
        names = ", ".join(schema.choices_of(group, config_dir()))
        note = f"{names} (now {shown(usual)})" if usual else names
        yield from _entry(f"{group}=", note, width)
    yield "\nKeys (key=value) and their values with the overrides given:"
    cfg = compose(command.name, given)
    for key in command.key_list(chosen):
        node = OmegaConf.select(cfg, key.name, throw_on_missing=False, default=key.default)
        missing = key.default == schema.NO_VALUE and node is None
        value = schema.NO_VALUE if missing else shown(node)
        yield from _entry(f"{key.name}={value}", key.text, width)


def _entry(head: str, text: str, width: int) -> Iterator[str]:
    """`head`, and behind it the text in a column of its own."""
    column = 34
    lines = textwrap.wrap(text, max(width - column - 2, 30)) or [""]
    if len(head) < column - 1:
        yield f"  {head:{column}}{lines.pop(0)}".rstrip()
    else:
        yield f"  {head}"
    yield from (" " * (column + 2) + line for line in lines)


def shown(value: Any) -> str:
    """A value as one would write it on the command line."""
    if isinstance(value, list | tuple) or OmegaConf.is_list(value):
        return "[" + ",".join(map(shown, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def _nobody_reads_stdout() -> bool:
    """Whether stdout is a pipe whose other end is closed: another pipe may have broken."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):
        return False
    poller = select.poll()
    poller.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poller.poll(0))


def quote_verbatim(argument: str, keys: Collection[str]) -> str:
    """The command-line argument, with its value quoted for Hydra if it is `key=...` of `keys`.

    `${` is escaped as well, which would be an interpolation even inside quotes.
    """
    key, equals, value = argument.partition("=")
    if not equals or key not in keys:
        return argument
    escaped = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)
    return f"{key}={QuotedString(text=escaped, quote=Quote.single).with_quotes()}"


def report_mistake(text: str) -> None:
    """Print the line a user sees for a mistake; ranks above 0 say which rank they are."""
    rank = os.environ.get("RANK", "0")
    prefix = "error: " if rank == "0" else f"error (rank {rank}): "
    print(prefix + text, file=sys.stderr, flush=True)


def telling_mistakes(main: Callable[P, int | None]) -> Callable[P, int]:
    """An entry point without a Hydra config: a UserError is one line and code 2, None is code 0."""

    @functools.wraps(main)
    def wrapper(*arguments: P.args, **named: P.kwargs) -> int:
        try:
            return main(*arguments, **named) or 0
        except UserError as error:
            report_mistake(str(error))
            return Exit.BAD_INPUT

    return wrapper
