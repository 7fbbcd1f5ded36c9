"""Write: one split of a task on its way to shards, packed, shuffled, laid out, written, counted."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.config import PrepareSettings
from data_prep.formats.groups import Arrays, group_arrays
from data_prep.formats.manifest import SPLITS, ShardInfo
from data_prep.formats.shards import write_shard
from data_prep.layout import RESPONSE, Int32Array, aligned_tables, build_layout
from data_prep.stages.pack import Packed, Piece, joined, make_packer, padding_of
from data_prep.tokenizers.load import Tokenizer

COUNTS_PER_ID = 4
"""Tokens for each id of the vocabulary that are counted in one go."""
ROOM_SHARE = 4096
"""A sequence with at most this fraction of its length left is taken for full."""


@dataclass
class Written:
    """The shards of one writer, and what they hold."""

    shards: list[ShardInfo] = field(default_factory=list)
    offsets: list[list[int]] = field(default_factory=list)
    """Of each shard: where its groups start and end; see `write_shard`."""
    cut_documents: int = 0
    cut_though_fitting: int = 0
    cuts: int = 0


class SplitWriter:
    """Takes the documents of one task and split; everything it does is a function of their order,
    the seed and the task's number."""

    def __init__(
        self, settings: PrepareSettings, split: str, tokenizer: Tokenizer, task: int
    ) -> None:
        self.settings = settings
        self.split = split
        self.task = task
        self.token_counts: NDArray[np.int64] = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        """How often each id stands in the finished shards, padding left out."""
        self.dtype = tokenizer.dtype
        self.pad_id = tokenizer.pad_id
        self.packer = make_packer(settings.packing, settings.sequence_length)
        self._uncounted: list[NDArray[np.integer]] = []
        self._packed: list[Packed] = []
        self._written = Written()

    def add(self, piece: Piece) -> None:
        """Take one document, its end token included, or what a cut left of one."""
        self._packed += self.packer.add(piece)

    def finish(self, folder: Path, prefix: str, *, keep_rests: bool) -> tuple[Written, list[Piece]]:
        """Write everything to `folder` as `prefix` and a number; returns the shards and the rests.

        With `keep_rests` sequences with room to speak of are not written: their pieces are
        returned, to be packed together with those of other tasks.
        """
        self._packed += self.packer.finish()
        unfilled: list[Packed] = []
        if keep_rests:
            room = self.settings.sequence_length // ROOM_SHARE
            length = self.settings.sequence_length
            full: list[Packed] = []
            for pieces in self._packed:
                (full if padding_of(pieces, length) <= room else unfilled).append(pieces)
            self._packed = full
        random.Random(f"{self.settings.seed} {self.split} {self.task}").shuffle(self._packed)
        first = 0
        while first < len(self._packed):
            count = self._shard_size(first)
            self._write(folder, prefix, first, self._packed[first : first + count])
            first += count
        self._packed.clear()
        self._written.cut_documents = self.packer.cut_documents
        self._written.cut_though_fitting = self.packer.cut_though_fitting
        self._written.cuts = self.packer.cuts
        return self._written, [piece for pieces in unfilled for piece in pieces]

    def _shard_size(self, first: int) -> int:
        """Sequences of the next shard. Those left are divided evenly, in whole groups, so that no
        last shard is a small one."""
        left = len(self._packed) - first
        if self.settings.shard_sequences is not None:
            return min(self.settings.shard_sequences, left)
        length, block = self.settings.sequence_length, self.settings.layout.block_size
        number = np.min_scalar_type(length).itemsize
        blocks = length * self.settings.layout.coverage / block + 2
        bytes_each = length * self.dtype.itemsize + 4 * blocks * number
        shards = -(-left * bytes_each // self.settings.shard_bytes)
        groups = -(-left // self.settings.group_size)
        return min(int(-(-groups // shards)) * self.settings.group_size, left)

    def _write(self, folder: Path, prefix: str, first: int, packed: Sequence[Packed]) -> None:
        size = self.settings.group_size
        starts = range(0, len(packed), size)
        groups = (self._group(first + start, packed[start : start + size]) for start in starts)
        padding = sum(padding_of(pieces, self.settings.sequence_length) for pieces in packed)
        name = f"{prefix}{len(self._written.shards):03d}.tar"
        info, offsets = write_shard(folder / name, name, groups, padding)
        self._written.shards.append(info)
        self._written.offsets.append(offsets)
        self._count()
        self.token_counts[self.pad_id] -= padding

    def _group(self, first: int, packed: Sequence[Packed]) -> Arrays:
        """What a sample holds of these sequences, of which `first` is the first's number."""
        tokens = joined(packed, self.settings.sequence_length, self.pad_id, self.dtype)
        self._uncounted.append(tokens.reshape(-1))
        if len(self._uncounted) * tokens.size > len(self.token_counts) * COUNTS_PER_ID:
            self._count()
        key = (SPLITS.index(self.split), self.task, first)
        with_prompts = self.settings.layout.loss_span == RESPONSE
        return group_arrays(
            tokens,
            [stored_lengths(pieces, self.settings.sequence_length) for pieces in packed],
            stored_layouts(self.settings, key, packed),
            [[piece.continued for piece in pieces] for pieces in packed],
            [[piece.prompt for piece in pieces] for pieces in packed] if with_prompts else None,
        )

    def _count(self) -> None:
        # Many at once: a count takes time in proportion to the vocabulary.
        if self._uncounted:
            tokens, self._uncounted = np.concatenate(self._uncounted), []
            self.token_counts += np.bincount(tokens, minlength=len(self.token_counts))


def stored_lengths(packed: Packed, sequence_length: int) -> list[int]:
    """The document lengths that a shard stores: padding has become a last document."""
    lengths = [len(piece.ids) for piece in packed]
    padding = sequence_length - sum(lengths)
    return [*lengths, padding] if padding else lengths


def stored_layouts(
    settings: PrepareSettings, key: tuple[int, int, int], packed: Sequence[Packed]
) -> tuple[Int32Array, NDArray[np.int64]]:
    """The layouts of these sequences, padding left out of each: their tables one below the other,
    [rows, 4], and how many rows each has.

    Each has a random stream of its own, keyed by the seed, `key` (the split's number, the task's,
    and the first sequence's in the task), and its place behind the first.
    """
    choice, mixed = settings.layout, settings.layout.mixed()
    lengths = [[len(piece.ids) for piece in pieces] for pieces in packed]
    prompts = None
    if choice.loss_span == RESPONSE:
        prompts = [[piece.prompt for piece in pieces] for pieces in packed]
    drawn = choice.coverage < 1.0 or choice.shift or mixed is not None
    if not drawn and prompts is None:
        return aligned_tables(lengths, choice.block_size)
    split, task, first = key
    tables = []
    for number in range(len(packed)):
        rng = np.random.default_rng([settings.seed, split, task, first + number])
        layout = build_layout(
            lengths[number],
            mixed.draw(rng) if mixed else choice.block_size,
            coverage=choice.coverage,
            shift=choice.shift,
            rng=rng,
            prompt_lengths=prompts[number] if prompts else None,
        )
        tables.append(layout.table())
    return np.concatenate(tables), np.array([len(table) for table in tables])
