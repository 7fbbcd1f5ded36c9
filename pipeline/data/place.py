"""Where a run's data is: the `data` section of a config."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pipeline.data.remote import is_remote, mirror
from tidar_common.config import existing_path, parse
from tidar_common.errors import UserError


@dataclass(frozen=True)
class DataConfig:
    dir: str | None = None
    """Folder written by tidar-prepare, or a URL of one (https://, s3://, pipe:COMMAND)."""
    cache_dir: str | None = None
    """Folder on the node's disk for the files of a URL."""
    cache_bytes: int | None = None
    """Bytes beyond which the oldest shards leave it; None keeps all."""
    skip_damaged: bool = False
    """Go on without a shard that cannot be read: its sequences come as padding."""
    mix: dict[str, Any] | None = None
    """Several prepared sets, each with a share of the tokens, by name:
    'data.mix={web:{dir:data/web,weight:0.7},code:{dir:data/code,weight:0.3}}'. data.dir then gives
    the tokenizer and the held-out text. A weight may change at steps: {0: 0.9, 20000: 0.5}."""

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
