"""The plans in docs/plans are what tidar-plan says today, one for each experiment on GPUs, and one
for long sequences."""

from pathlib import Path

import pytest

from tools import plans

ROOT = Path(__file__).resolve().parents[2]
ON_CPU = ("demo", "study")
SHIPPED = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))


def test_every_experiment_for_gpus_has_a_plan():
    assert sorted([*plans.EXPERIMENTS, *ON_CPU]) == SHIPPED


@pytest.mark.parametrize("name", [*(n for n in SHIPPED if n not in ON_CPU), "tidar_8b_32k"])
def test_a_plan_is_current(name):
    kept = (ROOT / "docs" / "plans" / f"{name}.txt").read_text(encoding="utf-8")
    assert kept == plans.text(name), "out of date; run python -m tools.plans"
