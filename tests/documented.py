"""The keys that `docs/metrics.md` explains."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"


def documented(heading: str) -> list[str]:
    """The keys in the first column of the table under a heading, in order."""
    sections = re.split(r"^#+ ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    (section,) = [s for s in sections if s.splitlines()[:1] == [heading]]
    return re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE)
