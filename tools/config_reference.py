"""Writes docs/config.md out of the YAML files in conf/: `python -m tools.config_reference`.

A key is described by the comment above it, so the page says what the files say. A test compares.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
PAGE = ROOT / "docs" / "config.md"
COMMANDS = ("prepare", "train", "evaluate", "generate", "export", "plan", "dashboard")
HYDRA_KEYS = ("defaults", "hydra")
KEY = re.compile(r"^( *)([A-Za-z_][\w@/]*):(?: (.*))?$")

HEAD = """\
# Configuration reference

<!-- Written by tools/config_reference.py; do not edit. -->

Every key of every command, with its default. Set one with `key=value` on the command line, choose
a file of a group with `group=file`, and see the values that result with `--cfg job`. A key without
a default (`???`) must be set.
"""


@dataclass(frozen=True)
class Entry:
    """A key as its file has it."""

    key: str
    default: str
    comment: str


def read_file(path: Path, prefix: str = "") -> tuple[str, list[Entry]]:
    """What the file's first comment says of it, and its keys, dotted, those of Hydra left out.

    The comment at the top speaks of the file. One for the first key stands behind an empty line.
    """
    entries: list[Entry] = []
    comment: list[str] = []
    parents: list[tuple[int, str]] = []
    about = ""
    skipping = False
    for line in path.read_text(encoding="utf-8").splitlines():
        found = KEY.match(line)
        if not line.strip() and comment and not about and not parents:
            about, comment = " ".join(comment), []
        elif line.startswith("#"):
            comment.append(line.lstrip("# "))
        elif line.strip().startswith("#"):
            if not skipping:
                comment.append(line.strip().lstrip("# "))
        elif found:
            indent, name, value = len(found[1]), found[2], (found[3] or "").strip()
            if indent == 0:
                skipping = name in HYDRA_KEYS
            if not parents and comment and not about:
                about, comment = " ".join(comment), []
            parents = [(level, parent) for level, parent in parents if level < indent]
            if skipping:
                comment = []
            else:
                key = ".".join([*(parent for _, parent in parents), name])
                if value:
                    entries.append(Entry(prefix + key, value, " ".join(comment)))
            parents.append((indent, name))
            comment = []
    return about, entries


def group_title(folder: Path) -> str:
    return folder.relative_to(CONF).as_posix()


def rows(entries: list[Entry]) -> Iterator[str]:
    yield "| key | default | |"
    yield "|---|---|---|"
    for entry in entries:
        default = entry.default.replace("|", "\\|")
        comment = entry.comment.replace("|", "\\|")
        yield f"| `{entry.key}` | `{default}` | {comment} |"


def page() -> str:
    """The whole page."""
    lines = [HEAD]
    for command in COMMANDS:
        _, entries = read_file(CONF / f"{command}.yaml")
        lines += [f"## tidar-{command}", ""]
        lines += [*rows(entries), ""] if entries else []
    lines += ["# Groups", ""]
    for folder in sorted(path for path in CONF.iterdir() if path.is_dir()):
        lines += [f"## {group_title(folder)}", ""]
        for path in sorted(folder.glob("*.yaml")):
            text = path.read_text(encoding="utf-8")
            package = re.match(r"# @package (\S+)\n", text)
            prefix = f"{folder.name}."
            if package:
                prefix = "" if package[1] == "_global_" else f"{package[1]}."
            about, entries = read_file(path, prefix)
            about = about.removeprefix(f"@package {package[1]} ") if package else about
            lines += [f"**`{folder.name}={path.stem}`** {about}", ""]
            lines += [*rows(entries), ""] if entries else []
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
