"""docs/config.md is what the files in conf/ say today, and no key goes without a word."""

from pathlib import Path

import pytest

from tools import config_reference as reference

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_current():
    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert page == reference.page(), "out of date; run python -m tools.config_reference"


def test_keys_comments_and_nesting_are_read(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(
        "# About\n# the file.\n\n# First.\na: 1\nb:\n  # Deep.\n  c: [1, 2]\nd: null\n"
        "hydra:\n  # Not ours.\n  run: x\n# Last.\ne: 3\n"
    )
    about, entries = reference.read_file(path, "p.")
    assert about == "About the file."
    found = [(entry.key, entry.default, entry.comment) for entry in entries]
    assert found == [
        ("p.a", "1", "First."), ("p.b.c", "[1, 2]", "Deep."), ("p.d", "null", ""),
        ("p.e", "3", "Last."),
    ]  # fmt: skip


@pytest.mark.parametrize("command", ["prepare", "train", "evaluate", "generate", "export", "plan"])
def test_every_key_of_a_command_has_a_comment(command):
    _, entries = reference.read_file(ROOT / "conf" / f"{command}.yaml")
    assert [entry.key for entry in entries if not entry.comment] == []
