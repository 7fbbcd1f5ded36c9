"""What a command takes: the one home of its keys, and where Hydra gets them from.

A key is a field of a dataclass: name, type, default, and in the string below it what it is, with
units and allowed values. `Command` says which dataclasses stand where in a command's config, and
`Choice` is one of a group that brings keys of its own, as readers of text do. Both are stored in
Hydra's ConfigStore; `conf/` has only what differs from them. Help, docs/config.md and the nearest
key to a misspelt one come from here.
"""

import ast
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore

NO_VALUE = "???"
"""OmegaConf's sign of a key that must be set."""
MODULES = {
    "prepare": "data_prep.config",
    "train": "pipeline.training.config",
    "evaluate": "pipeline.evals.config",
    "generate": "pipeline.decoding.config",
    "export": "pipeline.export",
    "plan": "pipeline.planning.config",
}
"""The module that registers a command, imported when it is asked for."""
QUIET = {
    "hydra": {"run": {"dir": "."}, "output_subdir": None},
}
"""Commands write where they are told, and nothing of Hydra's own."""


@dataclass(frozen=True)
class Key:
    """A key of a command as users see it."""

    name: str
    """Dotted."""
    default: Any
    text: str


@dataclass(frozen=True)
class Choice:
    """A choice of a group that brings keys of its own."""

    group: str
    name: str
    schema: type
    text: str
    values: Mapping[str, Any] = field(default_factory=dict)
    """Where it differs from the schema's defaults."""
    only: tuple[str, ...] = ()
    """The fields of `schema` that are keys of it; empty has all."""
    nested: bool = False
    """Several at a time, each below `group.name`; else one, below `group`."""

    @property
    def package(self) -> str:
        return f"{self.group}.{self.name}" if self.nested else self.group

    def key_list(self) -> Iterator[Key]:
        return keys_of(self.schema, self.package, self.content())

    def content(self) -> dict[str, Any]:
        content = defaults(self.schema) | dict(self.values)
        return {key: content[key] for key in self.only or content}


@dataclass(frozen=True)
class Command:
    """A command's config: the plain keys, the dataclass of each section, the groups."""

    name: str
    about: str
    """What stands above the keys in its help."""
    plain: type
    sections: Mapping[str, type] = field(default_factory=dict)
    """By dotted name."""
    groups: Mapping[str, Any] = field(default_factory=dict)
    """The choice that is taken by default."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """Defaults that differ from those of the dataclasses, by dotted name."""

    def key_list(self, choices: Mapping[str, Any] | None = None) -> list[Key]:
        """All keys, with those that the `choices` of groups bring, by default the usual ones."""
        keys = list(keys_of(self.plain, "", defaults(self.plain) | self._values_below("")))
        for section, schema in self.sections.items():
            content = defaults(schema) | self._values_below(f"{section}.")
            keys += keys_of(schema, section, content)
        for group, usual in self.groups.items():
            names = (choices or {}).get(group, usual)
            for name in names if isinstance(names, list) else [names]:
                if (choice := CHOICES.get((group, name))) is not None:
                    keys += choice.key_list()
        return keys

    def _values_below(self, prefix: str) -> dict[str, Any]:
        inside = {key.removeprefix(prefix): value for key, value in self.values.items()
                  if key.startswith(prefix)}  # fmt: skip
        return {key: value for key, value in inside.items() if "." not in key}

    def top_level(self) -> set[str]:
        """The first parts of all its keys."""
        groups = {group for group in self.groups if any(name == group for name, _ in CHOICES)}
        return (
            set(defaults(self.plain))
            | groups
            | {section.partition(".")[0] for section in self.sections}
        )

    def content(self) -> dict[str, Any]:
        """The config as Hydra takes it, its defaults list included."""
        content = defaults(self.plain)
        for section, schema in self.sections.items():
            _place(content, section, defaults(schema))
        for key, value in self.values.items():
            _place(content, key, value)
        groups = [{group: usual} for group, usual in self.groups.items()]
        loggers = [{f"override hydra/{name}_logging": "disabled"} for name in ("hydra", "job")]
        return {"defaults": ["_self_", *groups, *loggers], **content, **QUIET}


INTERNAL = {"internal": True}
"""Metadata of a field that is no key: code sets it."""
COMMANDS: dict[str, Command] = {}
CHOICES: dict[tuple[str, str], Choice] = {}


def register(command: Command, *choices: Choice) -> None:
    """Make a command, and choices of its groups, known to Hydra and to the help."""
    store = ConfigStore.instance()
    COMMANDS[command.name] = command
    store.store(name=command.name, node=command.content())
    for choice in choices:
        CHOICES[choice.group, choice.name] = choice
        store.store(
            group=choice.group, name=choice.name, package=choice.package, node=choice.content()
        )


def command(name: str) -> Command:
    """The command of that name, registered."""
    import_module(MODULES[name])
    return COMMANDS[name]


def key_fields(schema: type) -> list[Field[Any]]:
    """The fields of `schema` that are keys."""
    return [item for item in fields(schema) if not item.metadata.get("internal")]


def defaults(schema: type) -> dict[str, Any]:
    """The default of each key of `schema`, as plain values."""
    return {item.name: _default(item) for item in key_fields(schema)}


def _default(item: Field[Any]) -> Any:
    if item.default_factory is not MISSING:
        return item.default_factory()
    if item.default is MISSING:
        return NO_VALUE
    return list(item.default) if isinstance(item.default, tuple) else item.default


def keys_of(schema: type, prefix: str, content: Mapping[str, Any]) -> Iterator[Key]:
    """The keys of `content`, which are of `schema`, below `prefix`; those of a section inside where
    it has some."""
    notes, kinds = texts(schema), typing.get_type_hints(schema)
    for name, default in content.items():
        full = f"{prefix}.{name}" if prefix else name
        inner = next((kind for kind in typing.get_args(kinds[name]) if is_dataclass(kind)), None)
        if inner is not None and isinstance(default, dict):
            yield from keys_of(typing.cast(type, inner), full, default)
        else:
            yield Key(full, default, notes.get(name, ""))


@cache
def texts(schema: type) -> dict[str, str]:
    """The string below each field of a dataclass, in a user's words: null for None."""
    notes: dict[str, str] = {}
    for base in reversed(schema.__mro__):
        if not is_dataclass(base):
            continue
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(body, ast.ClassDef)
        for statement, below in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                text = " ".join(str(below.value.value).split())
                notes[statement.target.id] = re.sub(r"\bNone\b", "null", text)
    return notes


def choices_of(group: str, folder: Path) -> dict[str, str]:
    """The choices of `group`, registered or a file of `folder`, each with what is said of it."""
    registered = {name: choice.text for (of, name), choice in CHOICES.items() if of == group}
    files = {path.stem: about(path) for path in sorted((folder / group).glob("*.yaml"))}
    return registered | files


def about(path: Path) -> str:
    """The comment at the top of a YAML file, on one line."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line.lstrip("# "))
    return " ".join(lines)


def deviations(path: Path) -> dict[str, Any]:
    """What a YAML file sets, by dotted key; choices of its defaults list as `group`."""
    content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    chosen = {
        key.removeprefix("override /"): value
        for entry in content.pop("defaults", [])
        if isinstance(entry, dict)
        for key, value in entry.items()
    }
    return chosen | dict(_flat(content, ""))


def _flat(node: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _place(content: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for name in parents:
        content = content.setdefault(name, {})
    content[last] = value
