"""Every key of tidar-train has a type and bounds, and says so before anything is built."""

import math
from collections.abc import Iterator

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from data_prep.formats.manifest import Manifest
from pipeline.training.settings import TrainSettings
from tidar_common.cli import config_dir
from tidar_common.errors import UserError

FREE_TEXT = {
    "run_dir", "data.dir", "data.cache_dir", "init_from",
    "wandb.project", "wandb.entity", "wandb.name",
}  # fmt: skip
"""Any text will do; what must exist is looked for by other tests."""


@pytest.fixture(scope="module")
def defaults(tmp_path_factory) -> DictConfig:
    run_dir = tmp_path_factory.mktemp("bounds")
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("train", ["model=tiny", "data.dir=x", f"run_dir={run_dir}"])


@pytest.fixture(scope="module")
def manifest(data_dir) -> Manifest:
    return Manifest.load(data_dir)


def keys_of(node: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in node.items():
        if isinstance(value, dict):
            yield from keys_of(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def nonsense(value: object) -> list[object]:
    """Values that no key with this default could mean."""
    if isinstance(value, bool):
        return ["perhaps", [True]]
    if isinstance(value, int | float):
        return [-(10**9), math.nan, math.inf, "many"]
    if isinstance(value, str):
        return ["no such value"]
    return ["no such value", math.nan]


def test_the_defaults_are_good(defaults, manifest):
    assert TrainSettings.from_config(defaults, manifest).steps == defaults.steps


def test_no_key_takes_nonsense_and_each_is_named(defaults, manifest):
    plain = OmegaConf.to_container(defaults)
    accepted, unnamed, count = [], [], 0
    for key, value in keys_of(plain):
        for wrong in nonsense(value) if key not in FREE_TEXT else []:
            cfg = defaults.copy()
            OmegaConf.update(cfg, key, wrong)
            count += 1
            try:
                TrainSettings.from_config(cfg, manifest)
            except UserError as error:
                group = key.rpartition(".")[0] or key
                name = key.rpartition(".")[2]
                if not (str(error).startswith(group) and name in str(error)):
                    unnamed.append((key, wrong, str(error)))
            else:
                accepted.append((key, wrong))
    assert not accepted
    assert not unnamed
    assert count > 150
