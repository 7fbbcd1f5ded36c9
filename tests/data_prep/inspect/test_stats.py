"""`stats=true` counts what stands in the shards, and draws it."""

import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from test_prepare import texts_of

from data_prep.formats.manifest import CHECKSUM, MANIFEST, Manifest
from data_prep.formats.shards import read_shard
from data_prep.inspect.show import charts, piece_lengths, read_contents, write_page
from tidar_common.config import config_hash
from tidar_common.figures import Bar, BarChart, chart_grid
from tidar_common.page import Section, page


def test_lengths_are_those_of_the_pieces(prepared, tokenizer):
    manifest = Manifest.load(prepared)
    counted, continued = piece_lengths(prepared, manifest)
    assert counted.total() == len(texts_of(prepared, "train"))
    lengths = []
    for shard in manifest.train.shards:
        for sequence in read_shard(prepared / shard.name):
            real = sequence.real_tokens(tokenizer.pad_id)
            padded = real < len(sequence.tokens)
            lengths += sequence.document_lengths.tolist()[: -1 if padded else None]
    assert counted == Counter(length.bit_length() - 1 for length in lengths)
    assert counted.total() - continued == manifest.train.documents


@pytest.fixture
def copied(prepared, tmp_path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "data"))


def with_counts(folder: Path, **changed: object) -> None:
    """Change the manifest, with a checksum that fits."""
    values = json.loads((folder / MANIFEST).read_text())
    del values[CHECKSUM]
    values |= changed
    values[CHECKSUM] = config_hash(values)
    (folder / MANIFEST).write_text(json.dumps(values))


def test_the_command_prints_them(command, copied, overrides):
    result = command(f"output_dir={copied}", "stats=true")
    assert result.code == 0, result.err
    manifest = Manifest.load(copied)
    assert f"train: {manifest.train.documents:,} documents, {manifest.train.tokens:,}" in result.out
    assert "  64 to 127" in result.out
    assert "####" in result.out
    assert "0 of them though they fit" in result.out
    assert result.out.splitlines()[-1] == str(copied / "stats.html")
    # The page is no foreign file: the folder is still that of these settings, and whole.
    again = command(*overrides, f"output_dir={copied}")
    assert "is prepared with these settings already" in again.out
    assert command(f"output_dir={copied}", "verify=true").code == 0


def test_a_page_that_cannot_be_written_is_one_line(command, copied):
    (copied / "stats.html").mkdir()
    result = command(f"output_dir={copied}", "stats=true")
    assert result.code == 2
    assert "train: " in result.out
    assert result.err.startswith(f"error: output_dir: {copied} cannot take the page")
    assert result.err.count("\n") == 1


class Drawn(HTMLParser):
    """The bars of a page: of each figure by title, the texts in it, and the widths."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.figures: dict[str, list[str]] = {}
        self.widths: dict[str, list[float]] = {}
        self._within = self._title = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self._within = tag
        drawn = dict(attrs)
        if tag == "path" and drawn.get("style") == "fill: var(--ar)":
            places = [float(x) for x in re.findall(r"[ML] ([\d.]+)", drawn["d"])]
            self.widths[self._title].append(max(places) - min(places))

    def handle_endtag(self, tag):
        self._within = ""

    def handle_data(self, data):
        if self._within == "h3":
            self._title = data
            self.figures[data], self.widths[data] = [], []
        elif self._within == "text":
            self.figures[self._title].append(data)

    def bars(self, title: str) -> list[str]:
        """Label and what is shown of each bar."""
        half = len(self.figures[title]) // 2
        pairs = zip(self.figures[title][:half], self.figures[title][half:], strict=True)
        return [f"{label}: {shown}" for label, shown in pairs]


def test_the_page_has_what_the_folder_holds(copied):
    with_counts(
        copied,
        sources={
            "web <1>": {"documents": 2, "text_bytes": 400, "tokens": 100, "epochs": 1.0},
            "code": {"documents": 2, "text_bytes": 600, "tokens": 300, "epochs": 2.5},
        },
        documents={
            "read": 1000,
            "packed": 900,
            "refused": {"empty": 20},
            "filtered": {"quality: short": 50, "duplicate: exact": 30},
        },
    )
    contents = read_contents(copied)
    text = write_page(contents).read_text()
    assert write_page(contents).read_text() == text
    drawn = Drawn(text)
    assert not re.search(r" (src|href)=", text)
    total = contents.tokens
    assert drawn.bars("Length in tokens") == [
        f"{1 << power:,} to {(2 << power) - 1:,}: {contents.lengths[power]:,}"
        for power in range(min(contents.lengths), max(contents.lengths) + 1)
    ]
    assert drawn.bars("Tokens by source") == [
        f"code: 300 ({300 / total:.1%}, read 2.50 times)",
        f"web <1>: 100 ({100 / total:.1%})",
    ]
    assert drawn.bars("Tokens per byte by source") == ["code: 0.500", "web <1>: 0.250"]
    assert drawn.bars("Documents left out") == [
        "filtered: quality: short: 50 (5.00%)",
        "filtered: duplicate: exact: 30 (3.00%)",
        "refused: empty: 20 (2.00%)",
    ]
    train = contents.manifest.train
    share = train.padding / (train.padding + train.tokens)
    assert drawn.bars("Padding")[0] == f"train: {share:.3%} ({train.padding:,} tokens)"
    cut = f"{train.cut_documents:,} ({train.cut_documents / train.documents:.1%})"
    assert drawn.bars("Documents cut")[:2] == [
        f"train: longer than a sequence: {cut}", "train: would have fitted: 0 (0.0%)"
    ]  # fmt: skip
    assert text.count("stroke: var(--diffusion)") == 1, "the mark of the padding"
    # Bars are in proportion, from a common zero.
    longest, other = drawn.widths["Tokens by source"]
    assert other == pytest.approx(longest / 3, abs=0.1)


def test_one_corpus_is_one_source(copied):
    contents = read_contents(copied)
    by_title = {chart.title: chart for chart in charts(contents)}
    (bar,) = by_title["Tokens by source"].bars
    assert (bar.label, bar.value) == ("all text", contents.tokens)


def test_more_reasons_than_bars_are_counted(copied):
    filtered = {f"rule {number}": number for number in range(1, 26)}
    with_counts(copied, documents={"read": 500, "packed": 0, "refused": {}, "filtered": filtered})
    chart = next(c for c in charts(read_contents(copied)) if c.title == "Documents left out")
    assert [bar.value for bar in chart.bars] == list(range(25, 5, -1))
    assert chart.note.endswith("5 more with 15 documents.")


def test_any_name_can_be_drawn():
    odd = "\ud800\x00<b>" + "long " * 20
    charts = chart_grid([BarChart("t", [Bar(odd, 0.0, "$x$")]), BarChart("none", [])])
    text = page(odd, [Section(odd, charts)], paragraphs=[odd])
    text.encode()
    assert "<b>" not in text
    assert "\\ud800" in text
    assert "\x00" not in text
    assert "…</text>" in text
    assert "None." in text
    assert ">$x$<" in text


def test_a_folder_without_data_is_named(command, tmp_path):
    result = command(f"output_dir={tmp_path}", "stats=true")
    assert result.code == 2
    assert "manifest.json: not found" in result.err
