"""Text on every machine, and `tidar-prepare` as a function, for benchmarks of data."""

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from data_prep.corpora.text_files import StdlibConfig, StdlibCorpus
from data_prep.formats.manifest import Manifest
from data_prep.prepare import prepare
from tidar_common.cli import config_dir


def standard_library(max_bytes: int) -> list[str]:
    """The text of Python's own modules, a document each, up to `max_bytes` bytes."""
    return [d.text for d in StdlibCorpus(StdlibConfig(max_bytes=max_bytes)).documents()]


def repeated_library(max_bytes: int) -> list[str]:
    """The modules of Python's library again and again, up to `max_bytes` bytes."""
    once = standard_library(max_bytes)
    texts: list[str] = []
    size = 0
    while True:
        for text in once:
            size += len(text.encode())
            if size > max_bytes:
                return texts
            texts.append(text)


def write_jsonl(path: Path, texts: Sequence[str]) -> Path:
    """Write one object with `id` and `text` to a line; returns `path`."""
    rows = ({"id": str(number), "text": text} for number, text in enumerate(texts))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def composed(
    text: Path, *more: str, vocab_size: int, sequence_length: int, heldout_fraction: float = 0.2
) -> DictConfig:
    """The config of `tidar-prepare` for the jsonl file `text`, with the overrides `more`; it has
    no `output_dir` yet."""
    given = [
        "corpus=jsonl",
        f"corpus.path={text}",
        "corpus.id_field=id",
        f"tokenizer.vocab_size={vocab_size}",
        f"sequence_length={sequence_length}",
        f"heldout_fraction={heldout_fraction}",
        *more,
    ]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("prepare", given)


def prepare_folder(folder: Path, cfg: DictConfig) -> Manifest:
    """Run `tidar-prepare` into `folder` without its printing."""
    cfg.output_dir = str(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        prepare(cfg)
    return Manifest.load(folder)
