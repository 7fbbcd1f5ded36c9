"""Where a run's data is: the `data` section of a config."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from data_prep.formats.manifest import ShardInfo
from data_prep.formats.shards import wrong_sizes
from pipeline.data.remote import is_mirror, is_remote, mirror
from tidar_common.config import existing_path, parse
from tidar_common.errors import UserError


@dataclass(frozen=True)
class DataConfig:
    dir: str | None = None
    """A folder written by `tidar-prepare`, or a URL of one."""
    cache_dir: str | None = None
    """Where files of a URL are copied to; on a disk of the node, shared by its ranks."""
    cache_bytes: int | None = None
    """Shards used longest ago are removed beyond this; None keeps all."""
    skip_damaged: bool = False
    """Go on without a shard that cannot be read; its sequences come as padding."""
    mix: dict[str, Any] | None = None
    """By name: `dir` and `weight` of sets that are trained on together."""

    def __post_init__(self) -> None:
        if self.cache_bytes is not None and self.cache_bytes < 0:
            raise UserError(f"data.cache_bytes: must be at least 0, got {self.cache_bytes}")


def open_data_dir(cfg: DictConfig) -> Path:
    """The folder that `data.dir` names, or the local one that stands for its URL.

    Raises:
        UserError: when there is no such data, or a URL has no place to be copied to.
    """
    config = parse(DataConfig, cfg.data, "data")
    if config.dir is None or not is_remote(config.dir):
        return existing_path(cfg, "data.dir", "a folder written by tidar-prepare")
    return open_place(config.dir, config, "data.dir")


def open_place(place: str, config: DataConfig, key: str) -> Path:
    """The prepared folder at `place`, a path or a URL that stands under `key` in the config."""
    if not is_remote(place):
        path = Path(place).expanduser()
        if not path.exists():
            raise UserError(
                f"{key}: {path} does not exist; give the path of a folder written by tidar-prepare"
            )
        return path
    if config.cache_dir is None:
        raise UserError(
            f"data.cache_dir: has no value, and {place} has to be copied somewhere; set "
            "data.cache_dir=... to a folder on a disk of the node"
        )
    return mirror(place, Path(config.cache_dir).expanduser())


def check_shards(
    folder: Path, shards: Sequence[ShardInfo], key: str, *, skip_damaged: bool | None = None
) -> str | None:
    """Whether all `shards` are in `folder`, each with its size, so that none is missed after days.

    Contents are not read, and shards behind a URL are not looked at.

    Args:
        folder: a prepared data folder.
        shards: of its manifest.
        key: where the folder stands in the config.
        skip_damaged: `data.skip_damaged`; None where it does not help.

    Returns:
        What a run leaves out that skips damaged shards; None where all are there.

    Raises:
        UserError: naming the first that is not, and the remedy.
    """
    wrong = [] if is_mirror(folder) else wrong_sizes(folder, shards)
    if not wrong:
        return None
    more = f" (and {len(wrong) - 1:,} more of {len(shards):,} shards)" if len(wrong) > 1 else ""
    line = f"{key}: {wrong[0]}{more}"
    if skip_damaged:
        return f"{line}; left out, as data.skip_damaged says"
    other = ", or go on without with data.skip_damaged=true" if skip_damaged is False else ""
    raise UserError(f"{line}; copy it again or run tidar-prepare again{other}")
