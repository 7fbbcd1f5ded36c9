"""Links, commands and names in the pages lead to something that is there."""

import re
import tomllib

import pytest
from documented import ROOT

from bench.__main__ import BENCHMARKS

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in PAGES}
SOURCES = ("tidar_common", "data_prep", "pipeline", "slurm", "bench", "tools", "tests")


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", prose, flags=re.MULTILINE)
    plain = [re.sub(r"\]\([^)]*\)", "", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page.name]):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = page.parent / file if file else page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_exist(page):
    text = TEXTS[page.name]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for command in re.findall(r"(?<![\w/.-])tidar-[a-z]+\b(?![\w.-])", text):
        assert command in {*project["project"]["scripts"], "tidar-pretrain"}, command
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE):
        assert target in targets, target
    for module in re.findall(r"python -m ((?:bench|tools|pipeline|data_prep)[\w.]*)", text):
        path = ROOT / module.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file(), module
    for name in re.findall(r"python -m bench ([a-z_]+)", text):
        assert name in BENCHMARKS, name
    for script in re.findall(r"\b((?:slurm|bench|scripts)/\w+\.\w+)", text):
        # Of what a user copies there is an example.
        assert (ROOT / script).exists() or (ROOT / f"{script}.example").exists(), script
    for choice in re.findall(r"\bexperiment=(\w+)", text):
        assert (ROOT / "conf" / "experiment" / f"{choice}.yaml").exists(), choice


def test_pages_that_the_code_names_exist():
    names = {path.name for path in PAGES}
    for source in SOURCES:
        for path in (ROOT / source).rglob("*.*"):
            if path.suffix in (".py", ".sh", ".sbatch", ".example"):
                for name in re.findall(r"docs/(\w+\.md)", path.read_text(encoding="utf-8")):
                    assert name in names, f"{path.relative_to(ROOT)} names docs/{name}"
