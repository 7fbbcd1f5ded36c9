"""Command-line options from the fields of a dataclass: name, type, default and docstring."""

import argparse
import typing
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from tidar_common.errors import UserError
from tidar_common.schema import texts

T = TypeVar("T")


def add_options(parser: argparse.ArgumentParser, title: str, schema: type) -> None:
    """An option for every field of `schema`, with the string below the field as its help."""
    group = parser.add_argument_group(f"options of {title}")
    kinds, notes = typing.get_type_hints(schema), texts(schema)
    for field in fields(schema):
        assert field.default is not MISSING, "every option has a default"
        kind: Any = kinds[field.name]
        shown = field.default
        extra: dict[str, Any] = {"type": kind}
        if kind is bool:
            extra = {"action": argparse.BooleanOptionalAction}
        elif typing.get_origin(kind) is tuple:
            extra = {"type": typing.get_args(kind)[0], "nargs": "+"}
            shown = " ".join(map(str, field.default))
        flag = "--" + field.name.replace("_", "-")
        note = f"{notes[field.name]} (default {shown})"
        group.add_argument(flag, default=field.default, help=note, **extra)


def given_options(parsed: argparse.Namespace, schema: type[T]) -> T:
    """The options of `schema` from a parsed command line.

    Raises:
        UserError: when a whole number is below 1, or below 0 where 0 is the default.
    """
    values = {}
    for field in fields(schema):  # type: ignore[arg-type]
        value = getattr(parsed, field.name)
        least = 0 if field.default == 0 else 1
        for number in value if isinstance(value, list) else [value]:
            if type(number) is int and number < least:
                flag = field.name.replace("_", "-")
                raise UserError(f"--{flag}: must be at least {least}, got {number}")
        values[field.name] = tuple(value) if isinstance(value, list) else value
    return schema(**values)
