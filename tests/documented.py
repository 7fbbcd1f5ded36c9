"""The keys that `docs/evals.md` explains, and the parts of a page."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "evals.md"


def section(page: Path, heading: str) -> str:
    """What stands under a heading of a page, down to the next heading of any level."""
    sections = re.split(r"^#+ ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    (text,) = [s for s in sections if s.splitlines()[:1] == [heading]]
    return text


def documented(heading: str) -> list[str]:
    """The keys in the first column of the table under a heading, in order."""
    return re.findall(r"^\| `(\w+)` \|", section(PAGE, heading), flags=re.MULTILINE)
