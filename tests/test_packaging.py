"""What an installed copy holds is what the checkout holds; every shipped config is one."""

import tomllib
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from data_prep.cli import config_dir
from data_prep.manifest import Manifest
from pipeline.training.settings import TrainSettings

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))


def test_every_package_and_config_folder_is_listed():
    code = {p.parent for name in ("data_prep", "pipeline") for p in (ROOT / name).rglob("*.py")}
    conf = {p.parent for p in (ROOT / "conf").rglob("*.yaml")}
    expected = {".".join(p.relative_to(ROOT).parts) for p in code}
    expected |= {".".join(["pipeline", *p.relative_to(ROOT).parts]) for p in conf}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == expected


def test_every_requirement_is_pinned():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *(r for rows in extras.values() for r in rows)]
    names = {r.split(">=")[0].split("[")[0].lower().replace("_", "-") for r in wanted}
    assert names - pinned == set()


def test_console_scripts_are_there():
    for target in PROJECT["project"]["scripts"].values():
        module, function = target.split(":")
        path = ROOT / (module.replace(".", "/") + ".py")
        assert f"\ndef {function}(" in path.read_text()


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_is_a_config(experiment, data_dir):
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("train", [f"experiment={experiment}", "run_dir=x", f"data.dir={data_dir}"])
    settings = TrainSettings.from_config(cfg, Manifest.load(data_dir))
    assert settings.accumulation_steps(1) >= 1
    assert settings.schedule.warmup_steps < settings.steps
