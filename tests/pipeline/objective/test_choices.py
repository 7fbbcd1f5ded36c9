"""The names of objectives: one published, under two names, and a default that is one of them."""

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from pipeline.objective.loss import ObjectiveConfig
from tidar_common.cli import config_dir
from tidar_common.config import parse


def objective(*overrides: str) -> dict:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("train", ["data.dir=none", "run_dir=none", *overrides])
    parse(ObjectiveConfig, cfg.objective, "objective")
    return OmegaConf.to_container(cfg.objective)


def test_the_published_objective_has_two_names_and_the_values_of_the_paper():
    published = objective("objective=published")
    assert objective("objective=tidar") == published
    assert ObjectiveConfig(**published) == ObjectiveConfig()


def test_the_default_is_the_objective_where_none_is_named():
    assert objective() == objective("objective=default")


def test_an_alias_takes_overrides():
    assert objective("objective=tidar", "objective.alpha=0.5")["alpha"] == 0.5


@pytest.mark.parametrize("path", sorted((config_dir() / "objective").glob("*.yaml")))
def test_every_choice_has_the_same_keys(path):
    assert list(objective(f"objective={path.stem}")) == list(objective())
