"""The data path beside its ceilings: preparation, packing, reading, and memory for a large file.

Preparation is compared with the tokenizer alone on the same text and as many cores, reading with a
memory map and with a bare `webdataset.WebDataset` over the same shards, best-fit packing with
concatenation on the same documents. CPU times hold all processes. Targets: at least 90 % of the
tokenizer's speed, reading not slower than webdataset, padding at most 0.1 %.
"""

import functools
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.data_memory import peak_of_preparation
from bench.data_preparing import composed, prepare_folder, repeated_library, write_jsonl
from bench.data_reading import reading_variants
from bench.measure import Samples, ratio
from bench.processes import by_two
from bench.results import Outcome
from data_prep.formats.manifest import Manifest
from data_prep.stages.pack import Piece, joined, make_packer
from data_prep.tokenizers.load import Tokenizer, load_tokenizer

MODELS = {"unigram": 1, "bpe": 4}
"""Of each kind of tokenizer: the part of the text that it gets, 1 in this many. BPE takes several
times as long, and the start of a preparation weighs that much less beside it."""
READ = "unigram"
"""The tokenizer whose shards are read."""


@dataclass(frozen=True)
class Options:
    max_bytes: int = 64_000_000
    """text that is prepared, in bytes, with unigram; BPE, several times slower, gets a quarter;
    Python's own library, repeated as often as needed"""
    vocab_size: int = 4096
    """pieces of the SentencePiece models"""
    sequence_length: int = 4096
    """tokens of a packed sequence"""
    packed_tokens: int = 10_000_000
    """tokens of the documents that both packings get"""
    memory_bytes: int = 0
    """size of a jsonl file whose preparation's memory is watched; 0 leaves it out"""


def run(options: Options, device: torch.device, rounds: int, warmup: int) -> Outcome:
    outcome = Outcome()
    with tempfile.TemporaryDirectory(prefix="tidar-bench-") as name:
        folder = Path(name)
        for model, part in MODELS.items():
            texts = repeated_library(options.max_bytes // part)
            source = write_jsonl(folder / f"{model}.jsonl", texts)
            measure_preparation(outcome, options, folder / model, source, texts, model, rounds)
        data = folder / READ / "first"
        variants, tokens = reading_variants(data, Manifest.load(data))
        add(outcome, measured(variants, rounds, warmup), tokens, "read: ")
        webdataset = outcome.figures["read: webdataset, bare: tokens/s"]
        for name in ("read: by offset", "read: sequences in order"):
            outcome.figures[f"{name} / webdataset"] = (
                outcome.figures[f"{name}: tokens/s"] / webdataset
            )
        two = outcome.figures["read: sequences in order, 2 processes: tokens/s"]
        by_workers = outcome.figures["read: webdataset, bare, 2 worker processes: tokens/s"]
        outcome.figures["read: sequences in order / webdataset, 2 processes"] = two / by_workers
        measure_packing(outcome, options, rounds)
        if options.memory_bytes:
            tokenizer = data / "tokenizer.model"
            peak = peak_of_preparation(
                folder, folder / f"{READ}.jsonl", tokenizer, options.memory_bytes
            )
            outcome.figures |= {f"memory: {key}": value for key, value in peak.items()}
    return outcome


def measure_preparation(
    outcome: Outcome, options: Options, folder: Path, source: Path, texts: list[str], model: str,
    rounds: int,
) -> None:  # fmt: skip
    """`tidar-prepare` with 1 and 2 workers, each beside the tokenizer alone, with the same encoder
    in as many processes: two at a time take caches and clock from each other, with nothing around
    them as well."""
    given = functools.partial(
        composed, source, f"tokenizer.model_type={model}", vocab_size=options.vocab_size,
        sequence_length=options.sequence_length, heldout_fraction=0.05,
    )  # fmt: skip
    first = prepare_folder(folder / "first", given())
    path = folder / "first" / first.tokenizer.file
    tokenizer = load_tokenizer(path)
    tokenizer.encoder = first.encoder
    numbers = iter(range(10**9))

    def whole(workers: int) -> Callable[[], object]:
        cfg = given(f"tokenizer.path={path}", f"workers={workers}")
        return lambda: prepare_folder(folder / f"round-{next(numbers)}", cfg)

    alone = f"{model}, tokenizer alone"
    both = f"{alone}, 2 processes"
    variants = {
        alone: lambda: encode_all(tokenizer, texts),
        f"{model}, prepare with 1 worker": whole(1),
        both: lambda: by_two(lambda first: encode_all(tokenizer, texts[first::2])),
        f"{model}, prepare with 2 workers": whole(2),
    }
    samples = measured(variants, rounds, 1)
    splits = first.splits.values()
    add(outcome, samples, sum(split.tokens for split in splits))
    for name, reference in (("1 worker", alone), ("2 workers", both)):
        variant = f"{model}, prepare with {name}"
        share = ratio(samples[reference], samples[variant], at_least=0.9)
        outcome.ratios[f"{variant}: share of the tokenizer's speed"] = share
    outcome.figures[f"{model}: encoder"] = first.encoder
    outcome.figures[f"{model}: padding"] = first.train.padding / (
        first.train.padding + first.train.tokens
    )


def encode_all(tokenizer: Tokenizer, texts: list[str]) -> None:
    """In batches of about a megabyte, as preparation does."""
    for start in range(0, len(texts), 64):
        tokenizer.encode_batch(texts[start : start + 64])


def measure_packing(outcome: Outcome, options: Options, rounds: int) -> None:
    """Both packings of documents with lengths like those of web text: lognormal, median 500."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(500), 1.1, options.packed_tokens // 500), 10, 60_000)
    lengths = lengths[np.cumsum(lengths) < options.packed_tokens].astype(int)
    documents = [Piece(np.ones(n, dtype=np.uint16)) for n in lengths]
    tokens = int(lengths.sum())
    fitting = int((lengths <= options.sequence_length).sum())
    found: dict[str, dict[str, float]] = {}

    def pack(packing: str) -> None:
        packer = make_packer(packing, options.sequence_length)
        packed = [one for d in documents for one in packer.add(d)]
        packed += packer.finish()
        padding = sum(one.padding for one in packed)
        for start in range(0, len(packed), 32):  # as a shard's samples are
            joined(packed[start : start + 32], options.sequence_length, 0, np.dtype(np.uint16))
        found[packing] = {
            "padding": padding / (tokens + padding),
            "cuts": packer.cuts,
            "share of fitting documents cut": packer.cut_though_fitting / fitting,
        }

    variants = {
        f"pack: {packing}": lambda packing=packing: pack(packing)
        for packing in ("best_fit", "concatenate")
    }
    samples = measured(variants, rounds, 1)
    add(outcome, samples, tokens)
    for packing, figures in found.items():
        seconds = outcome.variants[f"pack: {packing}"]["cpu_seconds"]["median"]
        figures["ms per million tokens"] = seconds * 1e9 / tokens
        outcome.figures |= {f"pack: {packing}: {key}": value for key, value in figures.items()}


def measured(
    variants: Mapping[str, Callable[[], Any]], rounds: int, warmup: int
) -> dict[str, Samples]:
    """`bench.measure.interleaved`, with the CPU time of child processes that have ended."""
    samples = {name: Samples() for name in variants}
    for number in range(warmup + rounds):
        for name, work in variants.items():
            wall, cpu = time.perf_counter(), sum(os.times()[:4])
            work()
            if number >= warmup:
                samples[name].wall_seconds.append(time.perf_counter() - wall)
                samples[name].cpu_seconds.append(max(sum(os.times()[:4]) - cpu, 0.01))
    return samples


def add(outcome: Outcome, samples: dict[str, Samples], tokens: int, prefix: str = "") -> None:
    """Add times, and tokens per second by the clock, at the median."""
    outcome.add(samples, prefix)
    for name in samples:
        variant = outcome.variants[prefix + name]
        variant["tokens_per_second"] = tokens / variant["wall_seconds"]["median"]
        outcome.figures[f"{prefix}{name}: tokens/s"] = variant["tokens_per_second"]
