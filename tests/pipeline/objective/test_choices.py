"""The choices of objectives: the published one by default, the others where they differ."""

from dataclasses import fields

import pytest
from omegaconf import OmegaConf

from pipeline.objective.config import ObjectiveConfig
from tidar_common.cli import compose, config_dir
from tidar_common.config import parse

CHOICES = sorted(path.stem for path in (config_dir() / "objective").glob("*.yaml"))


def objective(*overrides: str) -> ObjectiveConfig:
    return parse(ObjectiveConfig, compose("train", overrides).objective, "objective")


def test_the_default_is_the_published_objective():
    assert objective() == objective("objective=tidar") == ObjectiveConfig()


def test_a_choice_takes_overrides():
    assert objective("objective=tidar", "objective.alpha=0.5").alpha == 0.5


@pytest.mark.parametrize("choice", CHOICES)
def test_a_choice_says_only_what_differs(choice):
    stated = OmegaConf.load(config_dir() / "objective" / f"{choice}.yaml")
    chosen, usual = objective(f"objective={choice}"), ObjectiveConfig()
    differing = {
        field.name: getattr(chosen, field.name)
        for field in fields(ObjectiveConfig)
        if getattr(chosen, field.name) != getattr(usual, field.name)
    }
    assert differing == stated
    assert chosen.drafts == (choice != "ar")


def test_a_choice_leaves_nothing_behind_of_the_one_it_replaces():
    mixed = objective("experiment=two_stage_1", "objective=tidar_auf")
    assert (mixed.place_weights, mixed.position_decay) == ("auf", 1.0)
