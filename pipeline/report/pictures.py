"""What the report and W&B show of evals: a generation by forwards, acceptance over training."""

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from markupsafe import Markup

from tidar_common.page import render, visible
from tidar_common.run_files import METHOD_LABELS

PROMPT_CHARACTERS = 480
MOST_EVALS = 40
"""That a heat map shows; of more, as many as fit are picked evenly, the last included."""


def generation(example: Mapping[str, Any]) -> Markup:
    """A real generation, with each token coloured by the forward pass that produced it."""
    tokens: list[dict[str, Any]] = example["tokens"]
    forwards = [
        (int(forward), [_white_space_shown(str(token["text"])) for token in members])
        for forward, members in groupby(tokens, key=lambda token: token["forward"])
    ]
    if not forwards:
        return Markup('<p class="empty">The last eval generated no tokens.</p>')
    prompt = str(example.get("prompt", ""))
    cut = "…" if len(prompt) > PROMPT_CHARACTERS else ""
    temperature = float(example.get("temperature", 0.0))
    how = "greedy" if temperature == 0 else f"T = {temperature:g}"
    method = METHOD_LABELS.get(str(example.get("method")), "this model")
    sizes = [len(texts) for _, texts in forwards]
    counts = [f"{size}: {sizes.count(size)}×" for size in range(1, max(sizes) + 1)]
    return render(
        "generation.html",
        sentence=f"{len(tokens)} tokens from {len(forwards)} forwards "
        f"({len(tokens) / len(forwards):.2f} tokens per forward) by {method}, {how}, after "
        f"{example.get('step', '?')} training steps. The prompt is grey. Tokens on one background "
        "came from the same forward pass.",
        prompt=_white_space_shown(cut + prompt[-PROMPT_CHARACTERS:]),
        forwards=forwards,
        most=max(sizes),
        counts=", ".join(counts),
    )


def _white_space_shown(text: str) -> Markup:
    """Text whose white space shows; what is copied from the page is still the text, but for control
    characters. The style sheet draws the marks on elements around the real characters."""
    text = text.replace("\r\n", "␍\n").replace("\r", "␍")
    kinds = {" ": "space", "\t": "tab", "\n": "newline"}
    return Markup("").join(
        Markup('<i class="{}">{}</i>').format(kinds[part], part) if part in kinds else visible(part)
        for part in re.split(r"([ \t\n])", text)
    )


def acceptance_map(rows: Sequence[Mapping[str, Any]]) -> Markup | None:
    """A heat map of the rows' `acceptance_by_position`, one line an eval; None without any.

    Args:
        rows: of one method and temperature, in order of step.
    """
    rows = [row for row in rows if row.get("acceptance_by_position")]
    if not rows:
        return None
    if len(rows) > MOST_EVALS:
        last = len(rows) - 1
        rows = [rows[round(i * last / (MOST_EVALS - 1))] for i in range(MOST_EVALS)]
    text = "Share of drafts accepted, by position in the block (across) and step (down)."
    names = [str(row["step"]) for row in rows]
    shares = [row["acceptance_by_position"] for row in rows]
    return Markup("<p>{}</p>").format(text) + heat_map(names, shares)


def heat_map(rows: Sequence[str], values: Sequence[Sequence[float | None]]) -> Markup:
    """Shares in [0, 1] as cells with their per cent, the darker the larger; nothing for None.
    `rows` are named, columns are counted from 1."""
    columns = max(map(len, values))
    return render("heat_map.html", rows=zip(rows, values, strict=True), columns=columns)
