"""The joint loss against the formula, and its independence of how a batch is divided."""

import math

import pytest

from pipeline.objective.loss import ObjectiveConfig


@pytest.mark.parametrize(("name", "alpha"), [("mdlm", 1.0), ("tidar", -0.1), ("tidar", math.inf)])
def test_bad_objectives_are_refused(name, alpha):
    with pytest.raises(ValueError, match="must be"):
        ObjectiveConfig(name, alpha)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"agreement": "js"}, "agreement must be one of none, tv, kl, acceptance, blend"),
        ({"agreement_weight": 0.5}, "agreement_weight needs agreement"),
        ({"agreement": "tv", "agreement_weight": 1.5}, r"agreement_weight must be in \[0, 1\]"),
        ({"alone_share": 1.1}, r"alone_share must be in \[0, 1\]"),
        ({"alone_weight": -1.0}, "alone_weight must be 0 or more"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\)"),
        ({"teacher": "base"}, "teacher must be one of ar, text"),
        ({"place_weights": "focal"}, "place_weights must be one of uniform, decay, dpace, auf"),
        (
            {"place_weights": "auf", "position_decay": 0.9},
            "position_decay needs place_weights=decay, not auf; set it to 1",
        ),
        ({"position_decay": 0.0}, r"position_decay must be in \(0, 1\]"),
        ({"agreement_ramp_steps": -1}, "agreement_ramp_steps must be 0 or more"),
    ],
)
def test_bad_variants_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**values)
