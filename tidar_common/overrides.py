"""What is wrong with a command line that Hydra could not make a config of, in one line."""

import re
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import MissingConfigException
from omegaconf import DictConfig

from tidar_common import schema
from tidar_common.errors import UserError
from tidar_common.schema import CHOICES, MODULES, Command

NOISE = ("full_key:", "object_type=", "Config search path:", "provider=")
"""Lines of Hydra's messages that tell a user of this project nothing, or nothing that helps."""
MOST_NAMED = 3


def describe(error: BaseException, command: Command, overrides: Sequence[str]) -> str:
    """What is wrong with the `overrides` of `command`, by Hydra's error."""
    override = getattr(error, "override", None)  # where one cannot be parsed
    if override:
        return unreadable(override, error)
    if isinstance(error, MissingConfigException) and "/" in str(error.missing_cfg_file):
        return missing_choice(error)
    unknown = re.match(r"Could not override '([^']*)'", str(error))
    if unknown is None:
        return one_line(error)
    return unknown_key(unknown[1], command, chosen(command, overrides))


def unreadable(override: str, error: BaseException) -> str:
    """An override whose value means something to Hydra that it should not."""
    key, equals, value = override.partition("=")
    if not equals or not value or value[0] in "[{'\"" or not re.fullmatch(r"[+~]*[\w.@/]+", key):
        return f"{override}: {one_line(error)}"
    quoted = QuotedString(text=value, quote=Quote.double).with_quotes()
    return f"{override}: has characters that must be quoted, as in '{key}={quoted}'"


def missing_choice(error: MissingConfigException) -> str:
    """A choice that its group does not have; says so where a file asks for it."""
    group, _, name = str(error.missing_cfg_file).rpartition("/")
    asking = re.match(r"In '(\w+/[^']*)'", str(error))
    where = f" (in {asking[1]})" if asking else ""
    # Hydra names no options where one of several is missing.
    names = error.options or sorted(name for of, name in CHOICES if of == group)
    return f"{group}: unknown choice {name!r}{where}; known are {', '.join(names)}"


def chosen(command: Command, overrides: Sequence[str]) -> dict[str, Any]:
    """The choices of groups among the overrides; several of one group are a list."""
    choices = {}
    for override in overrides:
        group, equals, value = override.lstrip("+").partition("=")
        if equals and group in command.groups:
            names = value.strip("[]").split(",")
            choices[group] = [name.strip() for name in names] if value[:1] == "[" else value
    return choices


def unknown_key(name: str, command: Command, choices: Mapping[str, Any]) -> str:
    """What to say of a dotted key that `command` does not have with these choices."""
    group = name.partition(".")[0]
    for (of, other), choice in CHOICES.items():
        if of == group and of in command.groups and name in {key.name for key in choice.key_list()}:
            now = choices.get(group, command.groups[group])
            return f"{name}: not a key of {group}={now}; it is one of {group}={other}"
    keys = {key.name for key in command.key_list(choices)}
    known = keys | sections_of(keys)
    if similar := by_words(name, known):
        return f"{name}: unknown key; did you mean {' or '.join(similar)}?"
    for other in MODULES:
        if other != command.name and name in {key.name for key in schema.command(other).key_list()}:
            return f"{name}: unknown key; it is decided by tidar-{other}"
    section, _, leaf = name.rpartition(".")
    split = [key.rpartition(".") for key in known]
    if beside := sorted(last for parent, _, last in split if section and parent == section):
        close = get_close_matches(leaf, beside, n=1)
        hint = f"did you mean {section}.{close[0]}?" if close else f"known are {', '.join(beside)}"
    else:
        close = get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else "see --help"
    return f"{name}: unknown key; {hint}"


def sections_of(keys: Collection[str]) -> set[str]:
    """What dotted keys stand in."""
    return {key[: match.start()] for key in keys for match in re.finditer(r"\.", key)}


def by_words(name: str, known: Collection[str]) -> list[str]:
    """The keys whose last part has the words of that of `name`, or these for initials; those
    beside it before others."""
    section, _, leaf = name.rpartition(".")
    words = set(leaf.split("_"))

    def similar(key: str) -> bool:
        parts = key.rpartition(".")[2].split("_")
        return words <= set(parts) or leaf == "".join(part[:1] for part in parts)

    for pool in ([key for key in known if key.rpartition(".")[0] == section], known):
        if matches := sorted(filter(similar, pool)):
            return matches if len(matches) <= MOST_NAMED else []
    return []


def nearest(name: str, known: Collection[str]) -> str:
    """What to say to a user who wrote `name` where only `known` names are understood."""
    close = by_words(name, known) or get_close_matches(name, known, n=1)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"known are {', '.join(sorted(known))}"


def refuse_unknown(cfg: DictConfig, command: Command, overrides: Sequence[str]) -> None:
    """Refuse a key that the command does not have.

    Hydra finds those on the command line, but takes any from an experiment's file or after a `+`.

    Raises:
        UserError: with the key and the nearest one that is known.
    """
    choices = chosen(command, overrides)
    known = {key.name for key in command.key_list(choices)}
    sections = sections_of(known)

    def walk(node: DictConfig, prefix: str) -> None:
        for name in map(str, node):
            full = prefix + name
            if full not in known | sections | command.top_level():
                raise UserError(unknown_key(full, command, choices))
            inside = node._get_node(name)
            if full in sections and isinstance(inside, DictConfig) and not inside._is_none():
                walk(inside, f"{full}.")

    walk(cfg, "")


def one_line(error: BaseException) -> str:
    """An exception's text on one line, without Hydra's hints."""
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [line for line in lines if line and not line.startswith(NOISE)]
    return " ".join(kept) or type(error).__name__
