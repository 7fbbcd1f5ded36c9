"""A report as a browser would see it."""

from html.parser import HTMLParser
from pathlib import Path

from pipeline.report.page import build_report


class Page(HTMLParser):
    """What a browser would see: tags, text by section, and the example's groups."""

    VOID = frozenset({"meta", "input", "br", "link", "img"})

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[str] = []
        self.text = ""
        self.groups: list[tuple[int, str, int]] = []
        """(forward, text, tokens)"""
        self.prompt = ""
        self.feed(source)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag in self.VOID or self.get_starttag_text().endswith("/>"):
            return
        self.open.append((tag, attributes))
        if "data-forward" in attributes:
            self.groups.append((int(attributes["data-forward"] or -1), "", 0))
        if attributes.get("class") == "token":
            forward, text, tokens = self.groups[-1]
            self.groups[-1] = (forward, text, tokens + 1)

    def handle_endtag(self, tag: str) -> None:
        if not self.get_starttag_text() or not self.open:
            raise AssertionError(f"</{tag}> without a start")
        opened, _ = self.open.pop()
        assert opened == tag, f"<{opened}> closed by </{tag}>"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        inside = [attributes for _, attributes in self.open]
        names = [tag for tag, _ in self.open]
        if any("data-forward" in attributes for attributes in inside):
            forward, text, tokens = self.groups[-1]
            self.groups[-1] = (forward, text + data, tokens)
        elif any(attributes.get("class") == "prompt" for attributes in inside):
            self.prompt += data
        if "h2" in names or "h3" in names:
            self.headings.append(data)
        if "script" not in names and "style" not in names:
            self.text += data


def page_of(run_dir: Path) -> Page:
    return Page(build_report(run_dir).read_text(encoding="utf-8"))
