"""Data preparation from text files to shards against the tokenizer alone on the same text.

Both use one process and the same SentencePiece model, trained beforehand. The text is Python's own
standard library, put into one jsonl file. Target: at least 90 % of the tokenizer's own speed.
"""

import contextlib
import io
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from bench.measure import interleaved, ratio
from bench.results import Outcome
from data_prep.cli import config_dir
from data_prep.corpora.python_stdlib import StdlibConfig, StdlibCorpus
from data_prep.manifest import Manifest
from data_prep.prepare import prepare
from data_prep.tokenizers import load_tokenizer


@dataclass(frozen=True)
class Options:
    max_bytes: int = 8_000_000
    """text that is read, in bytes"""
    vocab_size: int = 4096
    """pieces of the SentencePiece model"""
    sequence_length: int = 1024
    """tokens of a packed sequence"""
    block_size: int = 16
    """K, the most positions a block drafts"""
    workers: int = 1
    """processes that tokenise; the tokenizer alone uses one"""


def run(options: Options, device: torch.device, rounds: int, warmup: int) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="tidar-bench-") as name:
        folder = Path(name)
        texts = standard_library(options.max_bytes)
        given = overrides(options, write_jsonl(folder / "text.jsonl", texts))
        first = prepare_folder(folder / "first", composed(given))
        tokenizer_path = folder / "first" / first.tokenizer.file
        tokenizer = load_tokenizer(tokenizer_path)
        cfg = composed([*given, f"tokenizer.path={tokenizer_path}"])
        numbers = count()

        def whole() -> None:
            prepare_folder(folder / f"round-{next(numbers)}", cfg)

        def encode() -> None:
            tokenizer.encode_batch(texts)

        samples = interleaved(
            {"prepare": whole, "tokenizer alone": encode},
            rounds=rounds,
            warmup=warmup,
            device=device,
        )
    outcome = Outcome()
    outcome.add(samples)
    speed = ratio(samples["tokenizer alone"], samples["prepare"], at_least=0.9)
    outcome.ratios["prepare's share of the tokenizer's speed"] = speed
    splits = first.splits.values()
    tokens = sum(split.tokens for split in splits)
    text_bytes = sum(split.text_bytes for split in splits)
    for name, variant in outcome.variants.items():
        seconds = variant["wall_seconds"]["median"]
        variant["tokens_per_second"] = tokens / seconds
        variant["megabytes_per_second"] = text_bytes / 1e6 / seconds
        outcome.figures[f"{name}: tokens/s"] = tokens / seconds
        outcome.figures[f"{name}: MB/s"] = text_bytes / 1e6 / seconds
    outcome.figures |= {"text MB": text_bytes / 1e6, "tokens": tokens}
    return outcome


def standard_library(max_bytes: int) -> list[str]:
    """The text of Python's own modules, a document each, up to `max_bytes` bytes."""
    return [d.text for d in StdlibCorpus(StdlibConfig(max_bytes=max_bytes)).documents()]


def write_jsonl(path: Path, texts: Sequence[str]) -> Path:
    """Write one object with `id` and `text` to a line; returns `path`."""
    rows = ({"id": str(number), "text": text} for number, text in enumerate(texts))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def overrides(options: Options, text: Path) -> list[str]:
    """What `tidar-prepare` is told: to prepare the jsonl file `text`."""
    return [
        "corpus=jsonl",
        f"corpus.path={text}",
        "corpus.id_field=id",
        f"tokenizer.vocab_size={options.vocab_size}",
        f"sequence_length={options.sequence_length}",
        f"layout.block_size={options.block_size}",
        f"workers={options.workers}",
        "heldout_fraction=0.2",
    ]


def composed(given: Sequence[str]) -> DictConfig:
    """The config of `tidar-prepare` with the overrides `given`; it has no `output_dir` yet."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("prepare", list(given))


def prepare_folder(folder: Path, cfg: DictConfig) -> Manifest:
    """Run `tidar-prepare` into `folder` without its printing."""
    cfg.output_dir = str(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        prepare(cfg)
    return Manifest.load(folder)
