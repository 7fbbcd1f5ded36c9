"""Ways to read the training sequences of a prepared folder, all of them once.

A bare webdataset decodes the arrays of each group of sequences and builds nothing of them, nor does
the memory map; all others here give each sequence with its documents and its layout.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import webdataset

from bench.processes import by_two
from data_prep.formats.groups import decode_group
from data_prep.formats.manifest import Manifest
from data_prep.formats.shards import ShardReader
from pipeline.data.loader import Share, step_batches
from pipeline.data.source import SequenceSource

MICRO_BATCH = 4


def reading_variants(folder: Path, manifest: Manifest) -> tuple[dict[str, Callable[[], None]], int]:
    """By name: a function that reads every sequence; and how many tokens that is."""
    paths = [folder / shard.name for shard in manifest.train.shards]
    flat = folder.parent / "tokens.bin"
    write_flat(flat, paths)
    sequences, length = manifest.train.sequences, manifest.sequence_length
    kind = np.load(folder / "token_counts.npy").shape[0]
    dtype = np.min_scalar_type(kind - 1)

    def memory_map() -> None:
        tokens = np.memmap(flat, dtype=dtype, mode="r").reshape(sequences, length)
        for number in range(sequences):
            tokens[number].copy()

    def by_offset() -> None:
        for path, offsets in zip(paths, manifest.shard_index(folder), strict=False):
            reader = ShardReader(path, offsets)
            for number in range(reader.num_groups):
                for _ in reader.read_group(number):
                    pass

    def read_share(rank: int, world_size: int) -> None:
        source = SequenceSource(folder, manifest, manifest.train, seed=0)
        for number in range(rank, sequences, world_size):
            source[number]

    def batches() -> None:
        source = SequenceSource(folder, manifest, manifest.train, seed=0)
        steps = step_batches(source, Share(MICRO_BATCH, 1, 0, 1), 0, with_slots=True)
        for _ in range(sequences // MICRO_BATCH):
            next(steps)
        steps.close()

    variants = {
        "memory map of tokens": memory_map,
        "webdataset, bare": lambda: webdataset_arrays(paths),
        "webdataset, bare, 2 worker processes": lambda: webdataset_arrays(paths, workers=2),
        "webdataset, same objects": lambda: webdataset_sequences(paths),
        "by offset": by_offset,
        "sequences in order": lambda: read_share(0, 1),
        # As two ranks of a machine: whole groups are read by both, sequences are shared out.
        "sequences in order, 2 processes": lambda: by_two(lambda rank: read_share(rank, 2)),
        "training batches": batches,
    }
    return variants, sequences * length


def webdataset_arrays(paths: list[Path], workers: int = 0) -> None:
    """Decode the arrays of every group, in `workers` processes where there are any."""
    dataset = open_webdataset(paths).decode()
    loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=workers)
    for sample in loader if workers else dataset:
        assert len(sample["tokens.npy"])


def webdataset_sequences(paths: list[Path]) -> None:
    """Make the sequences of every group, with their documents and layouts."""
    for sample in open_webdataset(paths):
        for _ in decode_group(sample):
            pass


def open_webdataset(paths: list[Path]) -> webdataset.WebDataset:
    """The shards in order."""
    return webdataset.WebDataset(
        [str(path) for path in paths], shardshuffle=False, empty_check=False
    )


def write_flat(path: Path, shards: list[Path]) -> None:
    """All tokens one behind the other, as a memory map is usually laid over."""
    with path.open("wb") as file:
        for shard in shards:
            reader = ShardReader(shard)
            for number in range(reader.num_groups):
                for sequence in reader.read_group(number):
                    file.write(np.ascontiguousarray(sequence.tokens).tobytes())
