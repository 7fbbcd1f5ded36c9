"""Making batches from shards against the training step that uses them.

`wait for batches` is what a run loses: the time until the read-ahead thread hands over the next
step's batch, while steps run between. `make a batch` is the same work done at once in the main
thread. Target: waiting below 1 % of a step.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.data_preparing import composed, prepare_folder, standard_library, write_jsonl
from bench.inputs import model_config, new_model
from bench.measure import interleaved, ratio
from bench.results import Outcome
from bench.train_step import training_step
from data_prep.formats.manifest import Manifest
from pipeline.data.batch import Batch, make_batch, section_length
from pipeline.data.loader import Share, step_batches
from pipeline.data.source import LayoutChoice, SequenceSource


@dataclass(frozen=True)
class Options:
    model: str = "tiny"
    """a shape of conf/model"""
    vocab_size: int = 2048
    """pieces of the SentencePiece model"""
    length: int = 256
    """clean tokens of a sequence"""
    micro_batch_size: int = 8
    """sequences in the forward"""
    block_size: int = 8
    """K, the most positions a block drafts"""
    max_bytes: int = 1_000_000
    """text that is prepared for this, in bytes"""
    precision: str = "fp32"
    """fp32 or bf16"""


def run(options: Options, device: torch.device, rounds: int, warmup: int) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="tidar-bench-") as name:
        folder = Path(name) / "data"
        texts = standard_library(options.max_bytes)
        source = write_jsonl(Path(name) / "text.jsonl", texts)
        cfg = composed(
            source,
            f"layout.block_size={options.block_size}",
            vocab_size=options.vocab_size,
            sequence_length=options.length,
        )
        manifest = prepare_folder(folder, cfg)
        return measure(options, folder, manifest, device, rounds, warmup)


def measure(
    options: Options,
    folder: Path,
    manifest: Manifest,
    device: torch.device,
    rounds: int,
    warmup: int,
) -> Outcome:
    """Batches of the prepared `folder`, as stored and laid out anew, and the step between them."""
    stored = SequenceSource(folder, manifest, manifest.train, seed=0)
    anew = SequenceSource(folder, manifest, manifest.train, 0, LayoutChoice(shift=True))
    share = Share(options.micro_batch_size, 1, rank=0, world_size=1)
    config = model_config(options.model, manifest.tokenizer.vocab_size, options.block_size)
    model = new_model(config, options.precision, device)
    batches = step_batches(anew, share, 0, with_slots=True)
    step = training_step(model, next(batches)[0], device)
    samples = interleaved(
        {
            # The step comes right after: the thread makes its next batch meanwhile, as in a run.
            "wait for batches": lambda: next(batches),
            "training step": step,
            "make a batch": batch_maker(stored, share),
            "make a batch, laid out anew": batch_maker(anew, share),
        },
        rounds=rounds,
        warmup=warmup,
        device=device,
    )
    batches.close()
    outcome = Outcome()
    outcome.add(samples)
    for name in samples:
        if name != "training step":
            target = 0.01 if name.startswith("wait") else None
            pair = ratio(samples[name], samples["training step"], at_most=target)
            outcome.ratios[f"{name} / training step"] = pair
    return outcome


def batch_maker(source: SequenceSource, share: Share) -> Callable[[], Batch]:
    """A function that makes the micro-batch of the next step in the calling thread."""
    slots = section_length(source.manifest.sequence_length, source.coverage, source.block_slots)

    def make() -> Iterator[Batch]:
        seen = 0
        while True:
            for numbers in share.numbers(seen):
                yield make_batch(
                    [source[n] for n in numbers], source.manifest.tokenizer.mask_id, slots
                )
            seen += share.global_batch_size

    batches = make()
    return lambda: next(batches)
