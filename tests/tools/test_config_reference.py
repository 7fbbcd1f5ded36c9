"""docs/config.md is what the code says today; each key stands once, with a word."""

import re
from pathlib import Path

import pytest

from tidar_common import schema
from tools import config_reference as reference

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_current():
    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert page == reference.page(), "out of date; run python -m tools.config_reference"


@pytest.mark.parametrize("name", reference.COMMANDS)
def test_every_key_has_a_text_and_stands_on_the_page(name):
    command, page = schema.command(name), reference.page()
    for key in command.key_list():
        assert key.text, key.name
        assert f"- `{key.name}" in page or key.name.endswith(".kind"), key.name


def test_no_key_of_a_command_stands_twice():
    for part in re.split(r"^## ", reference.page(), flags=re.MULTILINE)[1:]:
        keys = re.findall(r"^- `([\w.]+)=", part, flags=re.MULTILINE)
        assert len(keys) == len(set(keys))


def test_a_choice_with_the_keys_of_another_says_so():
    lines = list(reference.group_lines("filters", "none"))
    assert lines.count("Has the keys of `gopher`.") == 1
    assert sum("filters.quality.min_doc_words=" in line for line in lines) == 1
