"""What a prepared folder holds: `tidar-prepare stats=true` in numbers and as a page of bars,
`inspect=N` the layout of a sequence as text and as a picture.

The picture has a row for every query and a column for every key, the clean section before the mask
section: who may attend to whom. It is drawn from the documents and the table alone.
"""

from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.formats.groups import PackedSequence
from data_prep.formats.manifest import STATS_PAGE, Manifest, Split
from data_prep.formats.shards import ShardReader
from data_prep.tokenizers.load import Tokenizer, load_tokenizer
from tidar_common.errors import UserError
from tidar_common.figures import Bar, BarChart, chart_grid, png
from tidar_common.files import write_text_atomic, written_atomically
from tidar_common.page import Section, page

PADDING_AIMED_AT = 0.001
TOP_REASONS = 20
"""Reasons that the page has a bar for, the most frequent ones."""


@dataclass(frozen=True)
class Contents:
    """What a prepared folder holds."""

    folder: Path
    manifest: Manifest
    lengths: Counter[int]
    """Pieces of train with 2^p to 2^(p+1) - 1 tokens, by p; padding is none."""
    continued: int
    """Pieces that go on from a cut."""

    @property
    def sources(self) -> dict[str, dict[str, float]]:
        """Of each corpus of a mix, the largest first: tokens, text bytes, epochs; {} of one."""
        by_size = sorted(self.manifest.sources.items(), key=lambda item: -item[1]["tokens"])
        return dict(by_size)

    @property
    def tokens(self) -> int:
        return sum(split.tokens for split in self.manifest.splits.values())

    @property
    def left_out(self) -> list[tuple[str, str, int]]:
        """`refused` or `filtered`, the reason or rule, and how many documents; of each kind the
        most frequent first."""
        documents = self.manifest.documents
        return [
            (kind, reason, count)
            for kind in ("refused", "filtered")
            for reason, count in Counter(documents.get(kind, {})).most_common()
        ]


def read_contents(folder: Path) -> Contents:
    """Read the manifest and every shard of train.

    Raises:
        UserError: naming a file that cannot be read.
    """
    manifest = Manifest.load(folder)
    return Contents(folder, manifest, *piece_lengths(folder, manifest))


def describe(contents: Contents) -> str:
    """Counts of both splits, and the charts, as lines of text."""
    manifest = contents.manifest
    lines = [
        f"{contents.folder}: sequences of {manifest.sequence_length} tokens, "
        f"encoder {manifest.encoder}"
    ]
    for name, split in manifest.splits.items():
        lines += _describe_split(name, split)
    return "\n".join([*lines, *(chart.text() for chart in charts(contents))])


def write_page(contents: Contents) -> Path:
    """Draw the same as bars into `stats.html` of the folder, one file that needs no other; returns
    its path. Raises OSError where the folder cannot be written."""
    manifest = contents.manifest
    paragraphs = [
        f"Sequences of {manifest.sequence_length:,} tokens, {manifest.tokenizer.kind} tokenizer "
        f"with {manifest.tokenizer.vocab_size:,} ids, encoder {manifest.encoder}."
    ]
    for name, split in manifest.splits.items():
        lines = _describe_split(name, split)
        paragraphs.append("; ".join(line.strip() for line in lines) + ".")
    path = contents.folder / STATS_PAGE
    title = f"Prepared data: {contents.folder.resolve().name}"
    drawn = Section("", chart_grid(charts(contents)))
    write_text_atomic(path, page(title, [drawn], paragraphs=paragraphs))
    return path


def charts(contents: Contents) -> list[BarChart]:
    """Lengths, tokens and tokens per byte by source, what was left out, padding, cuts."""
    powers = range(min(contents.lengths), max(contents.lengths) + 1)
    lengths = [
        Bar(
            "{:,} to {:,}".format(*_span(power)),
            contents.lengths[power],
            f"{contents.lengths[power]:,}",
        )
        for power in powers
    ]
    pieces = (
        "Pieces of train by their tokens: whole documents, and what cuts made of longer ones. "
        f"{contents.continued:,} of {contents.lengths.total():,} go on from a cut."
    )
    return [
        BarChart("Length in tokens", lengths, pieces),
        *_source_charts(contents),
        _left_out_chart(contents),
        *_packing_charts(contents.manifest.splits),
    ]


def _source_charts(contents: Contents) -> list[BarChart]:
    sources = contents.sources
    if not sources:
        # Not a mix: the only source is all of it.
        splits = contents.manifest.splits.values()
        size = sum(split.text_bytes for split in splits)
        sources = {"all text": {"tokens": contents.tokens, "text_bytes": size, "epochs": 1.0}}
    tokens, per_byte = [], []
    for name, counts in sources.items():
        share, epochs = counts["tokens"] / contents.tokens, counts["epochs"]
        again = f", read {epochs:.2f} times" if epochs != 1 else ""
        tokens.append(Bar(name, counts["tokens"], f"{counts['tokens']:,} ({share:.1%}{again})"))
        rate = counts["tokens"] / counts["text_bytes"]
        per_byte.append(Bar(name, rate, f"{rate:.3f}"))
    return [
        BarChart("Tokens by source", tokens, "Both splits, end tokens included."),
        BarChart(
            "Tokens per byte by source", per_byte,
            "Of UTF-8 text. A source with many is one that the tokenizer fits badly.",
        ),
    ]  # fmt: skip


def _left_out_chart(contents: Contents) -> BarChart:
    read = contents.manifest.documents["read"]
    top = sorted(contents.left_out, key=lambda row: -row[2])
    bars = [
        Bar(f"{kind}: {reason}", count, f"{count:,} ({count / read:.2%})")
        for kind, reason, count in top[:TOP_REASONS]
    ]
    note = f"By rule or reason, of {read:,} documents read."
    if rest := top[TOP_REASONS:]:
        note += f" {len(rest)} more with {sum(count for *_, count in rest):,} documents."
    return BarChart("Documents left out", bars, note)


def _packing_charts(splits: dict[str, Split]) -> list[BarChart]:
    padding, cut = [], []
    for name, split in splits.items():
        share = split.padding_share
        padding.append(Bar(name, share, f"{share:.3%} ({split.padding:,} tokens)"))
        fitting = split.cut_though_fitting
        for kind, count in (
            ("longer than a sequence", split.cut_documents - fitting),
            ("would have fitted", fitting),
        ):
            portion = count / max(split.documents, 1)
            cut.append(Bar(f"{name}: {kind}", portion, f"{count:,} ({portion:.1%})"))
    return [
        BarChart(
            "Padding", padding,
            "Share of the positions. The dashed line is 0.1 %; a small split cannot fill its last "
            "sequences.", PADDING_AIMED_AT,
        ),
        BarChart("Documents cut", cut, "Documents in more than one piece, and their share."),
    ]  # fmt: skip


def _span(power: int) -> tuple[int, int]:
    """Smallest and largest length with this whole logarithm to the base 2."""
    return 1 << power, (2 << power) - 1


def _describe_split(name: str, split: Split) -> list[str]:
    if not split.shards:
        return [f"{name}: no documents"]
    sizes = [shard.bytes for shard in split.shards]
    return [
        f"{name}: {split.documents:,} documents, {split.tokens:,} tokens, "
        f"{split.tokens / split.text_bytes:.3f} tokens per byte, "
        f"{split.tokens / split.documents:,.0f} tokens per document",
        f"  {split.sequences:,} sequences, {split.padding_share:.3%} padding, "
        f"{split.cut_documents:,} documents cut, {split.cut_though_fitting:,} of them though they "
        "fit",
        f"  {len(sizes):,} shards of {min(sizes) / 1e6:.2f} to {max(sizes) / 1e6:.2f} MB",
    ]


def piece_lengths(folder: Path, manifest: Manifest) -> tuple[Counter[int], int]:
    """How many pieces of the train split have 2^p to 2^(p+1) - 1 tokens, by p, padding left out;
    and how many go on from a cut."""
    lengths_by_power: Counter[int] = Counter()
    continued = 0
    for shard, offsets in zip(manifest.train.shards, manifest.shard_index(folder), strict=False):
        reader = ShardReader(folder / shard.name, offsets)
        for number in range(reader.num_groups):
            for sequence in reader.read_group(number):
                lengths = sequence.document_lengths.astype(np.int64)
                if sequence.real_tokens(manifest.tokenizer.pad_id) < len(sequence.tokens):
                    lengths = lengths[:-1]
                lengths_by_power.update((np.frexp(lengths)[1] - 1).tolist())
                continued += 0 if sequence.continued is None else int(sequence.continued.sum())
    return lengths_by_power, continued


LARGEST_SECTION = 1024
"""Positions and slots that are drawn, a pixel each; longer sections are cut off there."""
SHOWN_BLOCKS = 12
SHOWN_CHARACTERS = 48
NOTHING = (255, 255, 255)
CLEAN = ((46, 94, 170), (92, 143, 214))
PREFIX = ((208, 120, 36), (232, 165, 94))
OWN = (176, 42, 70)
PROMPT = (150, 160, 172)
"""Colours: a clean query's keys by document, a slot's prefix by block, a block's own slots, and the
keys of a prompt, which nothing is learnt of."""


def inspect_sequence(folder: Path, number: int) -> str:
    """Draw sequence `number` of the train split into `folder`-inspect-N.png beside the folder.

    Returns:
        str: what stands in it, and where the picture is.

    Raises:
        UserError: when there is no such sequence, or no room for the picture.
    """
    manifest = Manifest.load(folder)
    sequence = stored_sequence(folder, manifest, number)
    path = folder.with_name(f"{folder.name}-inspect-{number}.png")
    real = sequence.real_tokens(manifest.tokenizer.pad_id)
    try:
        with written_atomically(path) as file:
            file.write(png(attention_picture(sequence, real)))
    except OSError as error:
        raise UserError(
            f"inspect: {path} cannot be written ({error.strerror}); make {path.parent} writable"
        ) from error
    text = describe_sequence(sequence, real, load_tokenizer(folder))
    return f"sequence {number} of {folder}\n{text}\n{path}"


def stored_sequence(folder: Path, manifest: Manifest, number: int) -> PackedSequence:
    """Sequence `number` of the train split, counted from 0 over its shards."""
    first = 0
    for shard, offsets in zip(manifest.train.shards, manifest.shard_index(folder), strict=False):
        if number < first + shard.sequences:
            group, inside = divmod(number - first, manifest.group_size)
            return ShardReader(folder / shard.name, offsets).read_group(group)[inside]
        first += shard.sequences
    raise UserError(f"inspect: there are {first} sequences, so give a number up to {first - 1}")


def describe_sequence(sequence: PackedSequence, real: int, tokenizer: Tokenizer) -> str:
    """Documents and blocks as lines of text."""
    layout = sequence.layout
    lines = [
        f"clean section: {len(sequence.tokens)} tokens, {len(sequence.tokens) - real} of them "
        f"padding; mask section: {layout.num_slots} slots in {layout.num_blocks} blocks"
    ]
    start = 0
    marks = np.zeros(0, dtype=bool) if sequence.continued is None else sequence.continued
    for number, length in enumerate(sequence.document_lengths.tolist()):
        end = start + length
        if start < real:
            blocks = int(((layout.prefix_end >= start) & (layout.prefix_end < end)).sum())
            begun = ", goes on from a cut" if number < len(marks) and marks[number] else ""
            if sequence.prompt_lengths is not None and (prompt := sequence.prompt_lengths[number]):
                begun += f", of which {prompt} tokens are a prompt"
            text = tokenizer.decode(sequence.tokens[start : min(end, start + 40)].tolist())
            lines.append(
                f"document {number}: {start} to {end - 1}, {blocks} blocks{begun}: "
                f"{text[:SHOWN_CHARACTERS]!r}"
            )
        start = end
    lines.append("block: sees of the text, drafts, slots")
    for block, row in enumerate(islice(layout.table().tolist(), SHOWN_BLOCKS)):
        prefix, first, last, slot = row
        seen = f"{prefix} to {first - 1}" if first > prefix else "nothing"
        slots = f"{slot} to {slot + last - first - 1}"
        lines.append(f"{block}: {seen}, {first} to {last - 1}, {slots}")
    if layout.num_blocks > SHOWN_BLOCKS:
        lines.append(f"… and {layout.num_blocks - SHOWN_BLOCKS} more blocks")
    return "\n".join(lines)


def attention_picture(sequence: PackedSequence, real: int) -> NDArray[np.uint8]:
    """RGB pixels [side, side, 3]: a row for every query, a column for every key, of which each
    section shows the first `LARGEST_SECTION`."""
    layout = sequence.layout
    clean = min(len(sequence.tokens), LARGEST_SECTION)
    slots = min(layout.num_slots, LARGEST_SECTION)
    picture = np.full((clean + slots, clean + slots, 3), NOTHING, dtype=np.uint8)
    start = 0
    for number, length in enumerate(sequence.document_lengths.tolist()):
        end = min(start + length, clean)
        if start < min(real, clean):
            seen = np.tril(np.ones((end - start, end - start), dtype=bool))
            picture[start:end, start:end][seen] = CLEAN[number % 2]
            if sequence.prompt_lengths is not None:
                prompt = min(start + int(sequence.prompt_lengths[number]), end) - start
                picture[start:end, start : start + prompt][seen[:, :prompt]] = PROMPT
        start += length
    for block, (prefix, first, last, slot) in enumerate(layout.table().tolist()):
        rows = slice(clean + slot, clean + min(slot + last - first, slots))
        if slot < slots:
            picture[rows, min(prefix, clean) : min(first, clean)] = PREFIX[block % 2]
            picture[rows, rows] = OWN
    return picture
