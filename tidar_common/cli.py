"""The shell around every entry point: Hydra, one-line errors, exit codes.

A command ends with the code that its task returns, or as `run_files.Exit` says for mistakes and
faults.
"""

import functools
import os
import re
import select
import sys
from collections.abc import Callable, Collection, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import ParamSpec

import hydra
import yaml
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tidar_common.config import nearest
from tidar_common.errors import UserError
from tidar_common.run_files import Exit

P = ParamSpec("P")
NOISE = (
    "full_key:", "object_type=", "Config search path:", "provider=",
)  # fmt: skip
"""Lines of Hydra's messages that tell a user of this project nothing, or nothing that helps."""


def config_dir() -> Path:
    """The folder with the Hydra configuration: `conf/` of the checkout, or the installed copy."""
    root = Path(__file__).resolve().parent.parent
    for candidate in (root / "conf", root / "pipeline" / "conf"):
        if (candidate / "train.yaml").is_file():
            return candidate
    raise FileNotFoundError(f"no conf/ folder under {root}; reinstall tidar-pretrain")


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
    sys.argv[1:] = [quote_verbatim(argument, verbatim_keys) for argument in sys.argv[1:]]
    codes: list[int] = []
    mistakes: list[str] = []
    closed: list[BrokenPipeError] = []
    composed = False

    def guarded(cfg: DictConfig) -> None:
        nonlocal composed
        composed = True
        try:
            refuse_unknown(cfg, config_name)
            codes.append(task(cfg) or 0)
        except (UserError, OmegaConfBaseException) as error:
            # Caught inside the job, or Hydra adds lines of its own before it passes it on.
            mistakes.append(one_line(error))
        except BrokenPipeError as error:
            if not _nobody_reads_stdout():
                raise
            closed.append(error)

    try:
        hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=config_name)(
            guarded
        )()
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if composed:
            raise
        mistakes.append(describe_override(error, config_name))
    if closed:
        raise closed[0]
    if mistakes:
        report_mistake(mistakes[0])
        return Exit.BAD_INPUT
    return max(codes, default=0)


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
    def told(*arguments: P.args, **named: P.kwargs) -> int:
        try:
            return main(*arguments, **named) or 0
        except UserError as error:
            report_mistake(str(error))
            return Exit.BAD_INPUT

    return told


def describe_override(error: BaseException, config_name: str) -> str:
    """What is wrong with a command line that Hydra could not make a config of."""
    override = getattr(error, "override", None)  # where one cannot be parsed
    if override:
        return f"{override}: {one_line(error)}"
    unknown = re.match(r"Could not override '([^']*)'", str(error))
    if unknown is None:
        return one_line(error)
    key = unknown[1]
    close = get_close_matches(key, all_keys(config_name), n=1)
    return f"{key}: unknown key; " + (f"did you mean {close[0]}?" if close else "see --help")


def all_keys(config_name: str) -> list[str]:
    """Every dotted key of the config without overrides."""
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = OmegaConf.to_container(hydra.compose(config_name))

    def walk(node: object, prefix: str) -> Iterator[str]:
        if isinstance(node, dict):
            for name, value in node.items():
                yield f"{prefix}{name}"
                yield from walk(value, f"{prefix}{name}.")

    return list(walk(cfg, ""))


def refuse_unknown(cfg: DictConfig, config_name: str) -> None:
    """Refuse a key at the top that no file of this command has.

    Hydra finds those on the command line, but takes any from an experiment's file or after a `+`.

    Raises:
        UserError: with the key and the nearest one that is known.
    """
    known = top_level_keys(config_name)
    for name in map(str, cfg):
        if name not in known:
            raise UserError(f"{name}: unknown key; {nearest(name, known)}")


def top_level_keys(config_name: str) -> set[str]:
    """The keys of `conf/<config_name>.yaml`, and those that its defaults list brings."""
    content = yaml.safe_load((config_dir() / f"{config_name}.yaml").read_text(encoding="utf-8"))
    keys = {str(key) for key in content if key not in ("defaults", "hydra")}
    for entry in content.get("defaults", []):
        if isinstance(entry, str):
            keys |= top_level_keys(entry) if entry != "_self_" else set()
            continue
        group = str(next(iter(entry)))
        if not group.startswith(("override ", "optional ")):
            keys.add(group.rpartition("@")[2].partition(".")[0])
    return keys


def one_line(error: BaseException) -> str:
    """An exception's text on one line, without Hydra's hints."""
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [line for line in lines if line and not line.startswith(NOISE)]
    return " ".join(kept) or type(error).__name__
