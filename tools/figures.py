"""Draw the pictures of docs/method.md: `python -m tools.figures` rewrites them.

The mask pictures state the attention rules once more, in their own words, and refuse to draw
anything that `dense_mask` and `step_mask`, which training and decoding use, do not say too.
"""

from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import torch

from data_prep.layout import Layout, build_layout
from pipeline.decoding.step import StepShape, step_mask
from pipeline.model.mask import dense_mask

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "figures"
INK, MUTED, FAINT, PAPER = "#1a2027", "#5b6671", "#e9ecef", "#ffffff"
BLUE, GREEN, ORANGE, PURPLE, GREY = "#4a9fd8", "#2fae86", "#f0a830", "#c777ab", "#aab3bb"
DOCUMENT_LENGTHS, BLOCK_SIZE = (7, 5), 4
STEP_BLOCK_SIZE, STEP_PREFIX, STEP_ACCEPTED = 3, 4, 2

CAUSAL, PREFIX, BLOCK = "clean to clean", "slot to its prefix", "slot to its own block"
COLORS = {CAUSAL: BLUE, PREFIX: GREEN, BLOCK: ORANGE}


@dataclass
class Canvas:
    """SVG under construction, on an opaque sheet so that it reads on light and dark pages."""

    width: int
    height: int
    title: str
    marks: list[str] = field(default_factory=list)

    def box(self, x: float, y: float, size: tuple[float, float], fill: str, **style: str) -> None:
        extra = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in style.items())
        self.marks.append(
            f'<rect x="{x:g}" y="{y:g}" width="{size[0]:g}" height="{size[1]:g}" '
            f'fill="{fill}"{extra}/>'
        )

    def text(self, x: float, y: float, words: str, anchor: str = "middle", **style: str) -> None:
        style = {
            "font-size": "13",
            "fill": INK,
            **{k.replace("_", "-"): v for k, v in style.items()},
        }
        extra = "".join(f' {key}="{value}"' for key, value in style.items())
        self.marks.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{extra}>{escape(words)}</text>'
        )

    def line(self, path: str, color: str = INK, width: float = 1.4, dash: str = "") -> None:
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        self.marks.append(
            f'<path d="{path}" fill="none" stroke="{color}" stroke-width="{width:g}"{dashes}/>'
        )

    def svg(self) -> str:
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" role="img" '
            'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">\n'
            f"<title>{escape(self.title)}</title>\n"
            f'<rect width="{self.width}" height="{self.height}" rx="8" fill="{PAPER}"/>\n'
            + "\n".join(self.marks)
            + "\n</svg>\n"
        )


def rule(lengths: tuple[int, ...], layout: Layout, query: int, key: int) -> str | None:
    """The rule by which `query` may attend to `key`, or None; both count S clean, then M slots."""
    total = sum(lengths)
    document = [number for number, length in enumerate(lengths) for _ in range(length)]
    slot_block = [int(block) for block in layout.slot_block]
    if query < total:
        allowed = key < total and key <= query and document[key] == document[query]
        return CAUSAL if allowed else None
    block = slot_block[query - total]
    if key >= total:
        return BLOCK if slot_block[key - total] == block else None
    start = int(layout.prefix_end[block])
    return PREFIX if key < start and document[key] == document[start] else None


def training_mask(lengths: tuple[int, ...], block_size: int) -> str:
    """The attention mask of one packed sequence, coloured by rule."""
    layout = build_layout(lengths, block_size)
    total = sum(lengths)
    side = total + layout.num_slots
    allowed = dense_mask(lengths, layout)
    cell, left, top = 24, 164, 104
    canvas = Canvas(left + side * cell + 24, top + side * cell + 66, "TiDAR training mask")
    for row in range(side):
        for column in range(side):
            found = rule(lengths, layout, row, column)
            if (found is not None) != bool(allowed[row, column]):
                raise ValueError(f"the rule here and dense_mask differ at {row}, {column}")
            x, y = left + column * cell, top + row * cell
            color = COLORS[found] if found else FAINT
            canvas.box(x + 1, y + 1, (cell - 2, cell - 2), color, rx="2")
    positions = [*range(total), *(int(position) for position in layout.slot_position)]
    for index, position in enumerate(positions):
        name = f"x{position}" if index < total else f"m{position}"
        middle = (index + 0.5) * cell
        canvas.text(left + middle, top - 7, name, font_size="10.5", fill=MUTED)
        canvas.text(left - 6, top + middle + 4, name, "end", font_size="10.5", fill=MUTED)
    _mask_frame(canvas, lengths, layout, (left, top, cell))
    _legend(canvas, left - 40, top + side * cell + 40)
    return canvas.svg()


def _mask_frame(
    canvas: Canvas, lengths: tuple[int, ...], layout: Layout, place: tuple[int, int, int]
) -> None:
    """Section and document borders and their names."""
    left, top, cell = place
    total, side = sum(lengths), sum(lengths) + layout.num_slots
    spans, start = [], 0
    for number, length in enumerate(lengths):
        spans.append((start, start + length, f"document {number}"))
        start += length
    for block in range(layout.num_blocks):
        low = total + int(layout.slot_start[block])
        spans.append((low, low + int(layout.draft_lengths[block]), f"block {block}"))
    for low, high, name in spans:
        a, b = left + low * cell, left + high * cell
        canvas.line(f"M{a + 2} {top - 22}H{b - 2}", MUTED)
        short = name if high - low > 2 else name.replace("block ", "b")
        canvas.text((a + b) / 2, top - 29, short, font_size="12")
        a, b = top + low * cell, top + high * cell
        canvas.line(f"M{left - 34} {a + 2}V{b - 2}", MUTED)
        canvas.text(left - 40, (a + b) / 2 + 4, name, "end", font_size="12")
    for low, high, name in ((0, total, "keys: clean section"), (total, side, "keys: mask section")):
        middle = left + (low + high) / 2 * cell
        canvas.text(middle, top - 60, name, font_weight="600", font_size="14")
        middle = top + (low + high) / 2 * cell
        words = name.replace("keys", "queries")
        turn = f"rotate(-90 24 {middle:g})"
        canvas.text(24, middle, words, font_weight="600", font_size="14", transform=turn)
    split, end = left + total * cell, left + side * cell
    canvas.line(f"M{split} {top - 50}V{top + side * cell}", INK, 1.6)
    canvas.line(f"M{left - 110} {top + total * cell}H{end}", INK, 1.6)


def _legend(canvas: Canvas, x: float, y: float) -> None:
    for name, color in (*COLORS.items(), ("never", FAINT)):
        canvas.box(x, y - 11, (13, 13), color, rx="2")
        canvas.text(x + 19, y, name, "start")
        x += 44 + 6.6 * len(name)


def decoding_step(block_size: int, accepted: int) -> str:
    """Drafts, the blocks for every acceptance count, and what one outcome leaves."""
    cell, high, left, top, gap = 66, 34, 236, 92, 50
    cached = 3
    canvas = Canvas(
        left + (cached + 2 * block_size) * cell + 24, top + (block_size + 3) * gap + 48, "One step"
    )

    def put(row: float, column: int, words: str, color: str, **style: str) -> None:
        x, y = left + (cached + column) * cell, top + row * gap
        canvas.box(x + 2, y, (cell - 4, high), color, rx="5", **style)
        canvas.text(x + cell / 2, y + 22, words, font_size="14")

    def label(row: float, words: str, below: str = "") -> None:
        y = top + row * gap + (22 if not below else 14)
        canvas.text(left - 14, y, words, "end", font_weight="600")
        canvas.text(left - 14, y + 16, below, "end", font_size="12", fill=MUTED)

    for column in range(-cached, 2 * block_size):
        name = "P" if column == 0 else f"P{column:+d}".replace("-", "−")
        x = left + (cached + column + 0.5) * cell
        canvas.text(x, top - 16, name, font_size="12", fill=MUTED)
    canvas.text(left - 14, top - 16, "position", "end", font_size="12", fill=MUTED)
    canvas.text(24, 34, "One forward pass", "start", font_size="16", font_weight="600")
    canvas.text(
        24, 54, f"K = {block_size}: {block_size} drafts and {block_size} blocks of "
        f"{block_size} mask tokens, all at once", "start", fill=MUTED,
    )  # fmt: skip

    label(0, "cache and drafts", "verified by the AR logits")
    for column in range(-cached, 0):
        put(0, column, "cached", GREY)
    for index in range(block_size):
        put(0, index, f"d{index}", PURPLE if index == 0 else BLUE)
    for block in range(1, block_size + 1):
        seen = "d0" if block == 1 else f"d0 … d{block - 1}"
        label(block, f"block {block}", f"if {block} accepted; sees {seen}")
        chosen = block == accepted
        for slot in range(block_size):
            style = {"stroke": INK, "stroke_width": "2"} if chosen else {"opacity": "0.45"}
            put(block, block + slot, "mask", ORANGE, **style)
    _outcome(canvas, block_size, accepted, (left, top + (block_size + 1) * gap, cell, cached))
    return canvas.svg()


def _outcome(
    canvas: Canvas, block_size: int, accepted: int, place: tuple[int, int, int, int]
) -> None:
    """The state after a step in which `accepted` drafts, d_0 among them, were kept."""
    left, y, cell, cached = place
    canvas.line(f"M24 {y + 4}H{left + (cached + 2 * block_size) * cell}", GREY, 1, "4 4")
    kept = ", ".join(f"d{index}" for index in range(accepted))
    words = f"If {kept} are accepted and d{accepted} is rejected: the next step starts from"
    canvas.text(24, y + 32, words, "start", font_size="16", font_weight="600")
    row = y + 52
    canvas.text(left - 14, row + 14, "next cache and drafts", "end", font_weight="600")
    canvas.text(left - 14, row + 30, f"from block {accepted}", "end", font_size="12", fill=MUTED)
    entries = [("cached", GREY)] * cached + [(f"d{index}", GREY) for index in range(accepted)]
    entries += [("new d0", PURPLE)] + [(f"new d{index}", ORANGE) for index in range(1, block_size)]
    for column, (name, color) in enumerate(entries):
        x = left + column * cell
        canvas.box(x + 2, row, (cell - 4, 34), color, rx="5")
        canvas.text(x + cell / 2, row + 22, name, font_size="14")
    x = 24.0
    names = (("kept in the cache", GREY), ("final: set by the verifier", PURPLE))
    names += (("draft to verify", BLUE), ("mask tokens, and drafts read from them", ORANGE))
    for name, color in names:
        canvas.box(x, row + 61, (13, 13), color, rx="2")
        canvas.text(x + 19, row + 72, name, "start", font_size="12.5")
        x += 52 + 6.4 * len(name)


def decoding_mask(block_size: int, prefix: int) -> str:
    """Which query of a decoding step sees which key."""
    cell, left, top = 26, 126, 96
    rows = block_size + block_size**2
    allowed = step_mask(StepShape.full(block_size), prefix, torch.device("cpu"))
    canvas = Canvas(left + (prefix + rows) * cell + 24, top + rows * cell + 62, "Decoding mask")
    owners = [0] * block_size + [b for b in range(1, block_size + 1) for _ in range(block_size)]
    names = [f"d{i}" for i in range(block_size)] + ["M"] * block_size**2
    for query in range(rows):
        canvas.text(left - 8, top + (query + 0.65) * cell, names[query], "end", font_size="11")
        for key in range(-prefix, rows):
            x, y = left + (prefix + key) * cell, top + query * cell
            color = _step_color(owners, block_size, query, key)
            if (color != FAINT) != bool(allowed[query, prefix + key]):
                raise ValueError(f"the rule here and step_mask differ at {query}, {key}")
            canvas.box(x + 1, y + 1, (cell - 2, cell - 2), color, rx="2")
    for key in range(rows):
        x = left + (prefix + key + 0.5) * cell
        canvas.text(x, top - 7, names[key], font_size="11", fill=MUTED)
    spans = [(0, prefix, "cache"), (prefix, prefix + block_size, "drafts")]
    spans += [
        (prefix + b * block_size, prefix + (b + 1) * block_size, f"block {b}")
        for b in range(1, block_size + 1)
    ]
    for low, high, name in spans:
        a, b = left + low * cell, left + high * cell
        canvas.line(f"M{a + 2} {top - 24}H{b - 2}", MUTED)
        canvas.text((a + b) / 2, top - 32, name, font_size="12.5")
        if low >= prefix:
            a, b = (top + (end - prefix) * cell for end in (low, high))
            canvas.line(f"M{left - 30} {a + 2}V{b - 2}", MUTED)
            canvas.text(left - 37, (a + b) / 2 + 4, name, "end", font_size="12.5")
    canvas.text(left, 28, "keys", "start", font_weight="600", font_size="14")
    canvas.text(left - 37, top - 7, "queries", "end", font_weight="600", font_size="14")
    x = 24.0
    for name, color in (
        ("cache", GREY),
        ("drafts up to itself; in block j, d0 … d(j−1)", BLUE),
        ("own block", ORANGE),
    ):
        canvas.box(x, top + rows * cell + 27, (13, 13), color, rx="2")
        canvas.text(x + 19, top + rows * cell + 38, name, "start")
        x += 48 + 6.2 * len(name)
    return canvas.svg()


def _step_color(owners: list[int], block_size: int, query: int, key: int) -> str:
    if key < 0:
        return GREY
    block = owners[query]
    if key < block_size:
        seen = key <= query if block == 0 else key < block
        return BLUE if seen else FAINT
    return ORANGE if block and owners[key] == block else FAINT


def figures() -> dict[str, str]:
    """File name and SVG text of every picture."""
    return {
        "training_mask.svg": training_mask(DOCUMENT_LENGTHS, BLOCK_SIZE),
        "decoding_step.svg": decoding_step(STEP_BLOCK_SIZE, STEP_ACCEPTED),
        "decoding_mask.svg": decoding_mask(STEP_BLOCK_SIZE, STEP_PREFIX),
    }


if __name__ == "__main__":
    for file_name, text in figures().items():
        (FOLDER / file_name).write_text(text, encoding="utf-8")
        print(FOLDER / file_name)
