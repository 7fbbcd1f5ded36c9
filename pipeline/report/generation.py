"""A real generation, with each token coloured by the forward pass that produced it."""

import re
from itertools import groupby
from typing import Any

from pipeline.report.read import Row
from pipeline.report.wording import escape

COLORS = 4
PROMPT_CHARACTERS = 480


def groups(example: Row) -> list[tuple[int, list[str]]]:
    """(forward, its tokens' texts) in order; tokens of one forward stand together."""
    tokens: list[dict[str, Any]] = example["tokens"]
    return [
        (int(forward), [str(token["text"]) for token in members])
        for forward, members in groupby(tokens, key=lambda token: token["forward"])
    ]


def generation_section(example: Row) -> str:
    """The section's HTML; an empty generation says so."""
    found = groups(example)
    if not found:
        return '<p class="empty">The last eval generated no tokens.</p>'
    tokens = sum(len(texts) for _, texts in found)
    prompt = str(example.get("prompt", ""))
    cut = "…" if len(prompt) > PROMPT_CHARACTERS else ""
    prompt = cut + prompt[-PROMPT_CHARACTERS:]
    pieces = "".join(_group(number, *group) for number, group in enumerate(found))
    return (
        f"<p>{_sentence(example, tokens, len(found))}</p>\n"
        f"{_player(len(found))}\n"
        f'<pre class="generation" id="generation"><span class="prompt" title="the prompt">'
        f"{_visible(prompt)}</span>{pieces}</pre>\n"
        f"{_strip(found)}\n"
    )


def _sentence(example: Row, tokens: int, forwards: int) -> str:
    temperature = float(example.get("temperature", 0.0))
    how = "greedy" if temperature == 0 else f"T = {temperature:g}"
    method = {"tidar": "TiDAR", "ar": "AR"}.get(str(example.get("method")), "this model")
    return escape(
        f"{tokens} tokens from {forwards} forwards ({tokens / forwards:.2f} tokens per forward) "
        f"by {method}, {how}, after {example.get('step', '?')} training steps. The prompt is "
        "grey. Tokens on one background came from the same forward pass."
    )


def _player(forwards: int) -> str:
    """Controls that only work with scripts, so the script makes them visible."""
    return (
        '<div class="player" id="player" hidden><button type="button" id="play">Play</button>'
        f'<input type="range" id="scrub" min="0" max="{forwards}" value="{forwards}" '
        'aria-label="forwards shown"><output id="shown"></output></div>'
    )


def _group(number: int, forward: int, texts: list[str]) -> str:
    inner = "".join(f'<span class="token">{_visible(text)}</span>' for text in texts)
    count = "1 token" if len(texts) == 1 else f"{len(texts)} tokens"
    return (
        f'<span class="forward c{number % COLORS}" data-forward="{forward}" '
        f'title="forward {forward}: {count}">{inner}</span>'
    )


def _visible(text: str) -> str:
    """Escaped text whose white space shows; what is copied from the page is still the text,
    but for control characters.

    The marks are drawn by the style sheet on elements around the real characters.
    """
    text = text.replace("\r\n", "␍\n").replace("\r", "␍")
    parts = re.split(r"([ \t\n])", text)
    kinds = {" ": "space", "\t": "tab", "\n": "newline"}
    return "".join(
        f'<i class="{kinds[part]}">{part}</i>' if part in kinds else escape(part) for part in parts
    )


def _strip(found: list[tuple[int, list[str]]]) -> str:
    """One bar per forward, as high as it gave tokens."""
    most = max(len(texts) for _, texts in found)
    bars = "".join(
        f'<rect class="bar c{number % COLORS}" x="{10 * number + 1}" width="8" '
        f'y="{10 * (most - len(texts))}" height="{10 * len(texts)}">'
        f"<title>forward {forward}: {len(texts)}</title></rect>"
        for number, (forward, texts) in enumerate(found)
    )
    counts = [sum(len(texts) == size for _, texts in found) for size in range(1, most + 1)]
    words = ", ".join(f"{size}: {count}×" for size, count in enumerate(counts, start=1))
    return (
        '<figure class="strip"><figcaption>Tokens given by each forward, in order. '
        f"How often each number occurred: {words}.</figcaption>"
        f'<svg viewBox="0 0 {10 * len(found)} {10 * most}" preserveAspectRatio="none" role="img" '
        f'aria-label="tokens given by each forward">{bars}</svg></figure>'
    )
