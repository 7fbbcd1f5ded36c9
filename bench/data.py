"""The data path beside its ceilings: preparation, reading, and batches for a training step.

Preparation is compared with the tokenizer alone on the same text and as many processes, reading
with a bare `webdataset.WebDataset` that decodes the arrays of the same shards, and the time until
the read-ahead thread hands over a batch with the training step in between. Targets: at least 90 %
of the tokenizer's speed, reading not slower than webdataset, waiting below 1 % of a step.
"""

import contextlib
import functools
import io
import json
import multiprocessing
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import webdataset
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from bench.inputs import model_config, new_model
from bench.measure import Samples, Work, ratio
from bench.results import Bench
from bench.train_step import training_step
from data_prep.corpora.text_files import StdlibConfig, StdlibCorpus
from data_prep.formats.manifest import Manifest
from data_prep.formats.shards import ShardReader
from data_prep.prepare import prepare
from data_prep.tokenizers.load import Tokenizer, load_tokenizer
from pipeline.data.batch import Share, step_batches
from pipeline.data.source import LayoutChoice, SequenceSource
from tidar_common.cli import config_dir

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
    model: str = "tiny"
    """a shape of conf/model for the training step"""
    micro_batch_size: int = 1
    """sequences in its forward"""
    precision: str = "fp32"
    """fp32 or bf16"""


def run(options: Options, bench: Bench) -> None:
    # Nothing of it but the training step runs on a GPU.
    on_host = replace(bench, device=torch.device("cpu"))
    with tempfile.TemporaryDirectory(prefix="tidar-bench-") as name:
        folder = Path(name)
        for model, part in MODELS.items():
            texts = repeated_library(options.max_bytes // part)
            measure_preparation(options, folder / model, texts, model, replace(on_host, warmup=1))
        data = folder / READ / "first"
        manifest = Manifest.load(data)
        measure_reading(data, manifest, on_host)
        measure_batches(options, data, manifest, bench)


def repeated_library(max_bytes: int) -> list[str]:
    """The modules of Python's library again and again, up to `max_bytes` bytes."""
    library = [document.text for document in StdlibCorpus(StdlibConfig()).documents()]
    texts: list[str] = []
    size = 0
    while True:
        for text in library:
            size += len(text.encode())
            if size > max_bytes:
                return texts
            texts.append(text)


def measure_preparation(
    options: Options, folder: Path, texts: list[str], model: str, bench: Bench
) -> None:
    """`tidar-prepare` with 1 and 2 workers, each beside the tokenizer alone, with the same encoder
    in as many processes: two at a time take caches and clock from each other, with nothing around
    them as well."""
    folder.mkdir()
    source = folder / "text.jsonl"
    rows = ({"id": str(number), "text": text} for number, text in enumerate(texts))
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = functools.partial(prepare_config, options, source, f"tokenizer.model_type={model}")
    first = prepare_folder(folder / "first", config())
    path = folder / "first" / first.tokenizer.file
    encode = functools.partial(encode_all, load_tokenizer(path), first.encoder)
    numbers = iter(range(10**9))

    def whole(workers: int) -> Callable[[], object]:
        cfg = config(f"tokenizer.path={path}", f"workers={workers}")
        return lambda: prepare_folder(folder / f"round-{next(numbers)}", cfg)

    alone = f"{model}, tokenizer alone"
    both = f"{alone}, 2 processes"
    variants = {
        alone: lambda: encode(texts),
        f"{model}, prepare with 1 worker": whole(1),
        both: lambda: by_two(lambda half: encode(texts[half::2])),
        f"{model}, prepare with 2 workers": whole(2),
    }
    samples = time(bench, variants, sum(split.tokens for split in first.splits.values()))
    outcome = bench.outcome
    for workers, reference in (("1 worker", alone), ("2 workers", both)):
        variant = f"{model}, prepare with {workers}"
        share = ratio(samples[reference], samples[variant], at_least=0.9)
        outcome.ratios[f"{variant}: share of the tokenizer's speed"] = share
    outcome.figures[f"{model}: encoder"] = first.encoder
    outcome.figures[f"{model}: padding"] = first.train.padding / (
        first.train.padding + first.train.tokens
    )


def prepare_config(options: Options, text: Path, *more: str) -> DictConfig:
    """The config of `tidar-prepare` for a jsonl file; it has no `output_dir` yet."""
    overrides = [
        "corpus=jsonl",
        f"corpus.path={text}",
        "corpus.id_field=id",
        f"tokenizer.vocab_size={options.vocab_size}",
        f"sequence_length={options.sequence_length}",
        "heldout_fraction=0.05",
        *more,
    ]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("prepare", overrides)


def prepare_folder(folder: Path, cfg: DictConfig) -> Manifest:
    """Run `tidar-prepare` into `folder` without its printing."""
    cfg.output_dir = str(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        prepare(cfg)
    return Manifest.load(folder)


def encode_all(tokenizer: Tokenizer, encoder: str, texts: list[str]) -> None:
    """In batches of about a megabyte, as preparation does."""
    for start in range(0, len(texts), 64):
        tokenizer.encode_batch(texts[start : start + 64], encoder)


def by_two(work: Callable[[int], object]) -> None:
    """`work(0)` and `work(1)` at the same time, each in a process of its own.

    Raises:
        RuntimeError: when one of them fails; it has printed why.
    """
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(number,)) for number in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(codes := [process.exitcode for process in processes]):
        raise RuntimeError(f"processes of a benchmark ended with {codes}")


def measure_reading(folder: Path, manifest: Manifest, bench: Bench) -> None:
    """All training sequences once: their arrays by webdataset; their documents and layouts by
    offset, and in the order of a run."""
    paths = [folder / shard.name for shard in manifest.train.shards]

    def by_webdataset() -> None:
        names = [str(path) for path in paths]
        dataset = webdataset.WebDataset(names, shardshuffle=False, empty_check=False)
        for sample in dataset.decode():
            assert len(sample["tokens.npy"])

    def by_offset() -> None:
        for path, offsets in zip(paths, manifest.shard_index(folder), strict=False):
            reader = ShardReader(path, offsets)
            for number in range(reader.num_groups):
                for _ in reader.read_group(number):
                    pass

    def in_order() -> None:
        source = SequenceSource(folder, manifest, manifest.train, seed=0)
        for number in range(manifest.train.sequences):
            source[number]

    variants = {
        "webdataset, bare": by_webdataset,
        "by offset": by_offset,
        "sequences in order": in_order,
    }
    tokens = manifest.train.sequences * manifest.sequence_length
    samples = time(bench, variants, tokens, "read: ")
    for name in ("by offset", "sequences in order"):
        pair = ratio(samples["webdataset, bare"], samples[name], at_least=1.0)
        bench.outcome.ratios[f"read: {name}: speed of webdataset's"] = pair


def measure_batches(options: Options, folder: Path, manifest: Manifest, bench: Bench) -> None:
    """What a run waits for its next batch, laid out anew, while steps run between."""
    source = SequenceSource(folder, manifest, manifest.train, 0, LayoutChoice(shift=True))
    share = Share(options.micro_batch_size, 1, rank=0, world_size=1)
    config = model_config(options.model, manifest.tokenizer.vocab_size, manifest.block_size)
    batches = step_batches(source, share, 0, with_slots=True)
    model = new_model(config, options.precision, bench.device)
    step = training_step(model, next(batches)[0], bench.device)
    # The step comes right after: the thread makes its next batch meanwhile, as in a run.
    samples = bench.time({"wait for batches": lambda: next(batches), "training step": step})
    batches.close()
    bench.divide(samples, "wait for batches", "training step", at_most=0.01)


def time(
    bench: Bench, works: Mapping[str, Work], tokens: int, prefix: str = ""
) -> dict[str, Samples]:
    """Times, and tokens per second by the clock, at the median."""
    samples = bench.time(works, prefix)
    for name in (prefix + name for name in works):
        variant = bench.outcome.variants[name]
        variant["tokens_per_second"] = tokens / variant["wall_seconds"]["median"]
        bench.outcome.figures[f"{name}: tokens/s"] = variant["tokens_per_second"]
    return samples
