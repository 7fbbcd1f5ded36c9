"""Writes docs/config.md out of the commands' dataclasses: `python -m tools.config_reference`.

A key is described by the string below its field, a choice by the comment at the top of its file.
Each key stands once: where a second command or choice has the same ones, it says so. A test
compares.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tidar_common import schema
from tidar_common.cli import shown
from tidar_common.schema import CHOICES, Choice, Command, Key

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
PAGE = ROOT / "docs" / "config.md"
COMMANDS = ("prepare", "train", "evaluate", "generate", "export", "plan")
ELSEWHERE = {"evals.decode_speed": "train"}
"""Sections of a command that are described as a choice of a group."""
IN_THEIR_FILES = ("experiment",)
"""Groups whose files say a whole run: how the comment there begins is enough."""
LIKE = {"plan": "train"}
"""A command that takes all keys of another."""

HEAD = """\
# Configuration reference

<!-- Written by tools/config_reference.py; do not edit. -->

Every key of every command, with its default; experiments are in `conf/experiment`. Set one with
`key=value` on the command line, take a choice with `group=choice`; `--help` and `--cfg job` show
what results. A key at `???` must be set.
"""


def rows(keys: list[Key]) -> Iterator[str]:
    for key in keys:
        yield f"- `{key.name}={shown(key.default)}` {key.text}"


def command_lines(command: Command) -> Iterator[str]:
    """The command's keys but those of groups, then its groups."""
    yield f"## tidar-{command.name}"
    keys = list(command.key_list(dict.fromkeys(command.groups)))
    if command.name in LIKE:
        like = schema.command(LIKE[command.name])
        yield f"\nThe keys of tidar-{like.name}, of which it needs none, and:"
        shared = {key.name for key in like.key_list()}
        keys = [key for key in keys if key.name not in shared]
    hidden = [name for name, owner in ELSEWHERE.items() if owner == command.name]
    yield ""
    yield from rows([key for key in keys if not key.name.startswith(tuple(hidden))])
    for name in hidden:
        yield f"\n`{name}` has the keys of that choice of `evals`."
    yield ""


def group_lines(group: str, usual: Any) -> Iterator[str]:
    """The choices of a group; keys that an earlier choice has are not said again."""
    yield f"### {group}\n"
    said: dict[str, list[Key]] = {}
    for name, about in schema.choices_of(group, CONF).items():
        choice = CHOICES.get((group, name))
        path = CONF / group / f"{name}.yaml"
        mark = " (default)" if name in (usual if isinstance(usual, list) else [usual]) else ""
        if group in IN_THEIR_FILES:
            about = re.split(r"[.:,] ", about)[0].rstrip(".") + "."
        yield f"**`{group}={name}`**{mark} {about}"
        if choice is not None:
            yield from choice_keys(choice, said)
        elif group not in IN_THEIR_FILES:
            yield from changes(schema.deviations(path))
        yield ""


def choice_keys(choice: Choice, said: dict[str, list[Key]]) -> Iterator[str]:
    """Its keys that no earlier choice had, which are added to `said`, and the names of the rest."""
    keys = [key for key in choice.key_list() if not key.name.endswith(".kind")]
    known = {key.name for listed in said.values() for key in listed}
    new = [key for key in keys if key.name not in known and not is_filled(key, choice)]
    old = {key.name for key in keys if key.name in known}
    for name, listed in said.items():
        if listed and (names := {key.name for key in listed}) <= old:
            old -= names
            yield f"Has the keys of `{name}`."
    if old:
        parts = ", ".join(key.name.rpartition(".")[2] for key in keys if key.name in old)
        yield f"Has `{parts}` as above."
    said[choice.name] = new
    if new:
        yield ""
        yield from rows(new)


def is_filled(key: Key, choice: Choice) -> bool:
    """Whether a section that is null here has keys in another choice of the group."""
    inside = f"{key.name}."
    return any(
        other.name.startswith(inside)
        for (group, _), another in CHOICES.items()
        if group == choice.group
        for other in another.key_list()
    )


def changes(values: Mapping[str, Any]) -> Iterator[str]:
    """What a file of conf/ sets, as one would write it on the command line."""
    if any(value is not None for value in values.values()):
        yield f"`{' '.join(f'{key}={shown(value)}' for key, value in values.items())}`"


def page() -> str:
    """The whole page."""
    lines = [HEAD]
    groups: dict[str, Any] = {}
    for name in COMMANDS:
        command = schema.command(name)
        lines += command_lines(command)
        for group, usual in command.groups.items():
            if group not in groups:
                groups[group] = usual
                lines += group_lines(group, usual)
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
