"""The joint loss against the formula, and its independence of how a batch is divided."""

import math
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir

from pipeline.objective.joint import ObjectiveConfig, joint_loss, loss_sums

FILES = sorted(Path(__file__).parents[3].glob("conf/objective/*.yaml"))


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 7, generator=generator, dtype=torch.float64)
    return logits, torch.randint(0, 7, (20,), generator=generator)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, 3.3])
def test_loss_is_the_published_formula(rows, alpha):
    logits, labels = rows
    sums = loss_sums(logits, labels, 12)
    got = joint_loss(sums, ObjectiveConfig(alpha=alpha), 12, 8)
    ar = F.cross_entropy(logits[:12], labels[:12])
    diffusion = F.cross_entropy(logits[12:], labels[12:])
    expected = (alpha * ar + diffusion) / (1 + alpha)
    assert float(got) == pytest.approx(float(expected), rel=1e-6)


def test_parts_add_up_to_the_whole_however_unequal(rows):
    """Parts with 3 and 17 labels: a mean of means would differ."""
    logits, labels = rows
    objective = ObjectiveConfig(alpha=0.5)
    whole = joint_loss(loss_sums(logits, labels, 12), objective, 12, 8)
    first, second = [0, 1, 12], [i for i in range(20) if i not in (0, 1, 12)]
    parts = [
        joint_loss(loss_sums(logits[index], labels[index], count), objective, 12, 8)
        for index, count in ((first, 2), (second, 10))
    ]
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-6)
    means = [F.cross_entropy(logits[index], labels[index]) for index in (first, second)]
    assert abs(float(sum(means) / 2 - whole)) > 1e-3


def test_autoregressive_twin_ignores_the_rest(rows):
    logits, labels = rows
    got = joint_loss(loss_sums(logits[:12], labels[:12], 12), ObjectiveConfig("ar"), 12, 0)
    assert float(got) == pytest.approx(float(F.cross_entropy(logits[:12], labels[:12])), rel=1e-6)


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


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_choice_is_a_whole_objective(path):
    """All files have all keys, so that changing the choice leaves nothing of another behind."""
    with initialize_config_dir(str(path.parent), version_base="1.3"):
        values = compose(path.stem)
    assert set(values) == {field.name for field in fields(ObjectiveConfig)}
    assert ObjectiveConfig(**values).drafts == (path.stem != "ar")
