"""HTML pages that need no other file and no network: one template, everything escaped."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

TEMPLATES = Path(__file__).parent / "templates"
_CONTROL = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"} | {127: "␡"}


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    body: Markup
    folded: bool = False
    """Shown when the reader asks for it."""


@dataclass(frozen=True)
class Tile:
    """A figure at the top of a page."""

    label: str
    value: str
    context: str
    """What it has to be read against."""


def page(
    title: str,
    sections: Sequence[Section],
    *,
    kicker: str = "",
    subtitle: str = "",
    paragraphs: Sequence[str] = (),
    tiles: Sequence[Tile] = (),
    warnings: Sequence[str] = (),
    footer: str = "",
) -> str:
    """A whole page, for light and dark; equal arguments give equal text."""
    style = (TEMPLATES / "page.css").read_text(encoding="utf-8")
    return render(
        "page.html", title=title, sections=sections, kicker=kicker, subtitle=subtitle,
        paragraphs=paragraphs, tiles=tiles, warnings=warnings, footer=footer, style=Markup(style),
    )  # fmt: skip


def render(template: str, **values: Any) -> Markup:
    """A template of `templates/` filled with `values`."""
    return Markup(_environment().get_template(template).render(**values))


def visible(text: object) -> str:
    """Text that HTML allows and UTF-8 can store: control characters become their pictures."""
    return str(text).encode(errors="backslashreplace").decode().translate(_CONTROL)


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else visible(value),
    )
