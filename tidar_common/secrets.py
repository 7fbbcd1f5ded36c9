"""Keeping secrets of the environment out of what is written to disk or sent to a tracker."""

import os
import re
from collections.abc import Mapping
from typing import Any

NAMES = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH", re.IGNORECASE)
"""A variable of the environment with such a name holds a secret."""
SHORTEST = 8
"""Characters; a shorter value, such as `yes`, stands in too many texts that are no secret."""


def without_secrets(value: Any, environment: Mapping[str, str] | None = None) -> Any:
    """`value`, a config of plain containers, with every secret in its texts replaced.

    In place of a secret stands `${oc.env:NAME}`: what a config may say itself, so that it still
    means the same where the variable is set.

    Args:
        value: texts, numbers, and lists and dictionaries of them.
        environment: `os.environ` where it is None.
    """
    variables = os.environ if environment is None else environment
    replacements = {
        secret: f"${{oc.env:{name}}}"
        for name, secret in variables.items()
        if NAMES.search(name) and len(secret) >= SHORTEST
    }
    return _replaced(value, sorted(replacements.items(), key=lambda pair: -len(pair[0])))


def _replaced(value: Any, replacements: list[tuple[str, str]]) -> Any:
    if isinstance(value, dict):
        return {key: _replaced(entry, replacements) for key, entry in value.items()}
    if isinstance(value, list):
        return [_replaced(entry, replacements) for entry in value]
    if isinstance(value, str):
        for secret, instead in replacements:
            value = value.replace(secret, instead)
    return value
