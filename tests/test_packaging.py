"""What an installed copy holds is what the checkout holds; every shipped config is one."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from data_prep.formats.manifest import Manifest
from pipeline.training.settings import TrainSettings
from tidar_common.cli import config_dir

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SHIPPED = (".py", ".css", ".html", ".js")
EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))


def test_a_wheel_holds_the_code_and_the_configuration(tmp_path):
    """Built from a copy, so that the checkout is left as it is."""
    tree = tmp_path / "tree"
    for name in ("tidar_common", "data_prep", "pipeline", "conf"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet",
         "--wheel-dir", str(tmp_path), str(tree)],
        check=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    code = {p for top in ("tidar_common", "data_prep", "pipeline") for p in (ROOT / top).rglob("*")}
    wanted = {p.relative_to(ROOT).as_posix() for p in code if p.suffix in SHIPPED}
    wanted |= {f"pipeline/{p.relative_to(ROOT)}" for p in (ROOT / "conf").rglob("*.yaml")}
    assert held == wanted


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
    overrides = [f"experiment={experiment}", "run_dir=x", f"data.dir={data_dir}"]
    if experiment == "convert":  # its base says what the shape is, and is not here
        overrides.append("model=smollm2_135m")
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("train", overrides)
    settings = TrainSettings.from_config(cfg, Manifest.load(data_dir))
    assert settings.accumulation_steps(1) >= 1
    assert settings.schedule.warmup_steps < settings.steps
