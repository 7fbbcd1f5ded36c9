"""The messages that docs/troubleshooting.md explains are messages of the code."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
FOREIGN = {"CUDA out of memory", "data_wait_seconds"}
"""What torch says, and a key of metrics.jsonl."""
MESSAGES = sorted(set(re.findall(r"^\| `([^`]+)` \|", PAGE, re.MULTILINE)) - FOREIGN)


@pytest.fixture(scope="module")
def code() -> str:
    """All sources as one text, string literals that are continued on the next line joined."""
    files = [
        p
        for name in ("tidar_common", "data_prep", "pipeline", "slurm")
        for p in (ROOT / name).rglob("*.*")
    ]
    kinds = (".py", ".sh", ".sbatch")
    text = "\n".join(p.read_text(encoding="utf-8") for p in files if p.suffix in kinds)
    return re.sub(r'"\s*\n\s*f?"', "", text)


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_one_of_the_code(message, code):
    assert message in code


def test_many_are_explained():
    assert len(MESSAGES) >= 15


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
