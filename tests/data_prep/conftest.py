"""A small corpus of real text, one tokenizer trained on it, and `tidar-prepare` as a function."""

import json
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from omegaconf import OmegaConf

from data_prep.corpora import open_corpus
from data_prep.corpora.text_files import StdlibConfig, StdlibCorpus
from data_prep.prepare import prepare
from data_prep.stages.plan import Task
from data_prep.tokenizers.load import SentencePieceTokenizer
from data_prep.tokenizers.train import train_sentencepiece
from tidar_common.cli import run

DOCUMENTS = 90
CODE_BYTES = 700_000
CHARACTERS = 4000


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """The beginnings of modules of the standard library, of different lengths, and one in
    many scripts."""
    found = [document.text for document in StdlibCorpus(StdlibConfig()).documents()][:DOCUMENTS]
    cut = [text[: CHARACTERS * (1 + number % 7) // 7] for number, text in enumerate(found)]
    return [*cut, "Ein Satz. 一句话。 Одна фраза. 🙂👩‍👩‍👧 \u2581 \x00 <mask></s>\n" * 5]


@pytest.fixture(scope="session")
def tokenizer(texts: list[str]) -> SentencePieceTokenizer:
    return train_sentencepiece(texts, 600, "unigram", 100_000, seed=0)


@pytest.fixture(scope="session")
def tokenizer_path(tokenizer: SentencePieceTokenizer, tmp_path_factory) -> Path:
    return tokenizer.save(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def write_corpus() -> Callable[[Path, list[str]], Path]:
    """Write texts as JSON lines with ids; returns the path."""

    def write(path: Path, texts: list[str]) -> Path:
        lines = [json.dumps({"id": f"d{i}", "text": text}) for i, text in enumerate(texts)]
        path.write_text("\n".join(lines) + "\n")
        return path

    return write


@pytest.fixture(scope="session")
def corpus_path(texts: list[str], write_corpus, tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text.jsonl", texts)


@pytest.fixture(scope="session")
def overrides(corpus_path: Path, tokenizer_path: Path) -> list[str]:
    """What prepares the small corpus into some twenty shards."""
    return [
        "corpus=jsonl",
        f"corpus.path={corpus_path}",
        "corpus.id_field=id",
        f"tokenizer.path={tokenizer_path}",
        "sequence_length=128",
        "layout.block_size=8",
        "heldout_fraction=0.1",
        "shard_sequences=40",
        "group_size=16",
        "task_bytes=30000",
    ]


@pytest.fixture
def command(monkeypatch, capsys) -> Callable[..., Result]:
    """Run the command line `tidar-prepare …` in this process."""

    def call(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["tidar-prepare", *arguments])
        capsys.readouterr()
        try:
            code = run("prepare", prepare)
        except SystemExit as left:  # --help and --cfg leave this way
            code = int(left.code or 0)
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def prepared(overrides: list[str], tmp_path_factory) -> Path:
    """A finished folder; tests that change it copy it first."""
    folder = tmp_path_factory.mktemp("prepared") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tidar-prepare", *overrides, f"output_dir={folder}"])
        assert run("prepare", prepare) == 0
    return folder


def pytest_assertrepr_compare(op: str, left: object, right: object) -> list[str] | None:
    """Long byte strings differ in one line, not in pages."""
    if op == "==" and isinstance(left, bytes) and isinstance(right, bytes):
        return [f"bytes differ: {len(left)} and {len(right)} long"]
    return None


@pytest.fixture(scope="session")
def mixed() -> list[str]:
    """Code, many scripts, emoji, every code point that is one, and what a broken decoder leaves."""
    code = [d.text for d in StdlibCorpus(StdlibConfig(max_bytes=CODE_BYTES)).documents()]
    points = [
        chr(n)
        for n in range(1, sys.maxunicode + 1)
        if unicodedata.category(chr(n)) not in ("Cs", "Cn", "Co")
    ]
    scripts = ["".join(points[start : start + 997]) for start in range(0, len(points), 997)]
    broken = [
        bytes(np.random.default_rng(n).integers(0, 256, 500, dtype=np.uint8)).decode(
            errors="replace"
        )
        for n in range(20)
    ]
    ends = [
        "\r\n\r\n a\n\n\n\tb\n",
        "\n",
        "\n\n\n",
        "a\x0bb\x0cc\u2028d\x85e",
        "🙂\n👩\u200d👩\u200d👧 \n",
    ]
    texts = [*code, *scripts, *broken, *ends]
    assert sum(len(text.encode()) for text in texts) > 1_000_000
    return texts


@pytest.fixture
def corpus_of():
    """Make a folder of texts a corpus; returns it, and one task of all of it."""

    def make(tmp_path, texts):
        for number, text in enumerate(texts):
            (tmp_path / f"{number:03d}.txt").write_text(text, newline="")
        section = {"kind": "text_folder", "path": str(tmp_path)}
        corpus = open_corpus(OmegaConf.create(section))
        return corpus, [Task(0, tuple(corpus.parts()), "")]

    return make
