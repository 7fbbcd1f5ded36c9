"""From a Hydra config section to the dataclass of the part that owns it."""

import hashlib
import json
import math
import re
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tidar_common.errors import UserError
from tidar_common.overrides import nearest

T = TypeVar("T")


def parse(schema: type[T], section: DictConfig, key: str) -> T:
    """Check `section` (found at `key`, "" for the whole config) against `schema` and build it.

    Raises:
        UserError: naming `key.field` when a key is unknown, missing (`???`) or of the wrong type,
            or when the dataclass itself refuses the values (a ValueError in `__post_init__`).
    """
    prefix = f"{key}." if key else ""
    known = {field.name for field in fields(schema)}  # type: ignore[arg-type]
    if not isinstance(section, DictConfig):
        raise UserError(f"{key}: expected a group of keys ({', '.join(sorted(known))})")
    for name in map(str, section):
        if name not in known:
            raise UserError(f"{prefix}{name}: unknown key; {nearest(name, known)}")
        if OmegaConf.is_missing(section, name):
            full = prefix + name
            raise UserError(f"{full}: has no value; set {full}=... on the command line")
    refuse_non_finite(section, prefix)
    refuse_single_values(schema, section, prefix)
    try:
        typed = OmegaConf.merge(OmegaConf.structured(schema), section)
        return OmegaConf.to_object(typed)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        full_key = getattr(error, "full_key", None)
        name = f"{prefix}{full_key}" if full_key else key
        raise UserError(f"{name}: {first_line(error)}") from error
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{key}: {error}" if key else str(error)) from error


def refuse_non_finite(section: DictConfig, prefix: str) -> None:
    """NaN and infinity get past bounds that they should not, so no key takes them.

    Raises:
        UserError: naming the first such key.
    """
    plain: dict[str, Any] = OmegaConf.to_container(section)  # type: ignore[assignment]
    for name, value in plain.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{prefix}{name}: must be a finite number, got {value}")


def refuse_single_values(schema: type, section: DictConfig, prefix: str) -> None:
    """A list is written with brackets, one of a single value as well.

    Raises:
        UserError: naming the first key that has a text or a number instead.
    """
    for name, kind in get_type_hints(schema).items():
        value = section.get(name)
        kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
        lists = {list, tuple} & set(map(get_origin, kinds))
        if isinstance(value, str | int | float) and lists:
            raise UserError(f"{prefix}{name}: must be a list, such as {prefix}{name}=[{value}]")


def require(cfg: DictConfig, *keys: str) -> None:
    """Check that the dotted `keys` have values; raises UserError naming the first without."""
    for key in keys:
        if OmegaConf.select(cfg, key, throw_on_missing=False) is None:
            raise UserError(f"{key}: has no value; set {key}=... on the command line")


def existing_path(cfg: DictConfig, key: str, what: str) -> Path:
    """The path under `key`, which must exist; `what` says what should be there."""
    require(cfg, key)
    path = Path(str(OmegaConf.select(cfg, key))).expanduser()
    if not path.exists():
        raise UserError(f"{key}: {path} does not exist; give the path of {what}")
    return path


def array_share(array: str | None) -> tuple[int, int]:
    """The i and n of `array=i/n`, the i-th of n shares; None is all, 0 of 1.

    Raises:
        UserError: when it is no share.
    """
    if array is None:
        return 0, 1
    match = re.fullmatch(r"(\d+)/(\d+)", array)
    index, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if index >= count:
        raise UserError(
            f"array: {array!r} is not i/n with i from 0 to n-1; the third of four is 2/4"
        )
    return index, count


def config_hash(config: Any) -> str:
    """SHA-256 (hex) of a plain config value, independent of key order."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def first_line(error: BaseException) -> str:
    """The first non-empty line of an exception's text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
