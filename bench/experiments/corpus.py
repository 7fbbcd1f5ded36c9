"""Text of the experiments: Python sources, and held-out files that the training text does not hold.

    python -m bench.experiments.corpus installed FOLDER --sequence-length 2048 --vocab-size 32000

A held-out file leaves when too many of its n-grams of words stand in a training file: a copy of a
module, or one of many tables made by the same script, would be recited and not predicted.
"""

import argparse
import json
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data_prep.config import in_heldout
from data_prep.corpora.base import Document
from data_prep.corpora.files import File, local_file
from data_prep.corpora.text_files import (
    SKIPPED_FOLDERS,
    FilesCorpus,
    StdlibConfig,
    StdlibCorpus,
)
from tidar_common.cli import telling_mistakes
from tidar_common.errors import UserError
from tidar_common.files import write_text_atomic, written_atomically

WORD = re.compile(r"\w+|[^\w\s]")
NGRAM = 13
MOST_SHARED = 0.1
"""Share of a held-out file's n-grams that may stand in training text."""
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class CorpusChoice:
    """Which text, and how it is prepared."""

    name: str
    heldout_fraction: float
    sequence_length: int = 256
    vocab_size: int = 1024
    max_bytes: int | None = None
    """Stop after this much text; None takes all of it."""


CORPORA = {
    "stdlib": CorpusChoice("stdlib", heldout_fraction=0.03),
    "installed": CorpusChoice("installed", heldout_fraction=0.003),
}
"""The standard library; the same with all Python sources that are installed beside this project."""


def prepare(choice: CorpusChoice, folder: Path) -> Path:
    """Write the deduplicated text and prepare it; returns the data folder. Does nothing twice.

    `folder/text.json` says what was dropped and what is still shared.
    """
    text, about, data = folder / "text.jsonl", folder / "text.json", folder / "data"
    if not about.is_file():
        write_text_atomic(about, json.dumps(write_corpus(choice, text), indent=1) + "\n")
    if not (data / "manifest.json").is_file():
        code = subprocess.run(
            [sys.executable, "-m", "data_prep.prepare", "corpus=jsonl", f"corpus.path={text}",
             "corpus.id_field=id", f"output_dir={data}",
             f"sequence_length={choice.sequence_length}", "layout.block_size=8",
             f"tokenizer.vocab_size={choice.vocab_size}",
             f"heldout_fraction={choice.heldout_fraction}"],
            cwd=ROOT, check=False,
        ).returncode  # fmt: skip
        if code:
            raise UserError(f"{data}: could not be prepared; the message above says why")
    return data


def write_corpus(choice: CorpusChoice, path: Path) -> dict[str, Any]:
    """Write the documents that stay as JSON lines, each with `id` and `text`; returns counts."""
    corpus = open_sources(choice)
    wanted = ngrams_of_heldout(corpus, choice.heldout_fraction)
    seen = {gram for grams in wanted.values() for gram in grams}
    met: set[int] = set()
    for document in corpus.documents():
        if document.id not in wanted:
            met |= seen & ngrams(document.text)
    shared = {name: len(grams & met) / max(len(grams), 1) for name, grams in wanted.items()}
    dropped = {name for name, share in shared.items() if share > MOST_SHARED}
    kept = 0
    with written_atomically(path) as file:
        for document in corpus.documents():
            if document.id not in dropped:
                kept += 1
                file.write(json.dumps({"id": document.id, "text": document.text}).encode() + b"\n")
    left = [wanted[name] for name in wanted if name not in dropped]
    grams = {gram for of_document in left for gram in of_document}
    return {
        "corpus": asdict(choice),
        "python": sys.version.split()[0],
        "documents": kept,
        "ngram": NGRAM,
        "most_shared": MOST_SHARED,
        "heldout_documents": len(left),
        "heldout_dropped": len(dropped),
        "heldout_ngrams_shared": len(grams & met) / max(len(grams), 1),
    }


def open_sources(choice: CorpusChoice) -> FilesCorpus:
    """Python sources: the standard library, or it and everything in `site-packages`."""
    stdlib = StdlibCorpus(StdlibConfig(max_bytes=choice.max_bytes))
    if choice.name == "stdlib":
        return stdlib
    root = Path(sysconfig.get_path("purelib"))
    paths = [
        p
        for p in sorted(root.rglob("*.py"))
        if not SKIPPED_FOLDERS & set(p.relative_to(root).parts)
    ]
    beside = [local_file(p, f"site-packages/{p.relative_to(root).as_posix()}") for p in paths]
    return FilesCorpus([*stdlib.files, *_first_bytes(beside, choice.max_bytes, stdlib.total_bytes)])


def _first_bytes(files: Iterable[File], most: int | None, taken: int) -> Iterator[File]:
    """Files until `most` bytes are reached, of which `taken` are gone."""
    for file in files:
        taken += file.size
        if most is not None and taken > most:
            return
        yield file


def ngrams_of_heldout(corpus: FilesCorpus, fraction: float) -> dict[str, set[int]]:
    """By id, the n-grams of the documents that `tidar-prepare` (seed 0) will hold out."""
    return {
        document.id: ngrams(document.text) for document in heldout_of(corpus.documents(), fraction)
    }


def heldout_of(documents: Iterator[Document], fraction: float) -> Iterator[Document]:
    return (d for d in documents if in_heldout(d.id, seed=0, fraction=fraction))


def ngrams(text: str) -> set[int]:
    """Hashes of the runs of `NGRAM` words and signs in `text`, equal within one process."""
    words = [hash(word) for word in WORD.findall(text)]
    return {hash(tuple(words[i : i + NGRAM])) for i in range(len(words) - NGRAM + 1)}


@telling_mistakes
def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.experiments.corpus")
    parser.add_argument("corpus", choices=CORPORA)
    parser.add_argument("folder", type=Path, help="for the text and the prepared data")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--max-bytes", type=int, help="stop after this much text")
    given = vars(parser.parse_args(arguments))
    choice, folder = CORPORA[given.pop("corpus")], given.pop("folder")
    print(prepare(replace(choice, **given), folder))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
