"""One split of a task on its way to shards: packed, shuffled, laid out, written, counted."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.groups import PackedSequence
from data_prep.layout import RESPONSE, Layout, build_layout
from data_prep.manifest import SPLITS, ShardInfo
from data_prep.packing import Packed, Piece, make_packer
from data_prep.settings import PrepareSettings
from data_prep.shards import write_shard
from data_prep.tokenizers import Tokenizer

TOGETHER = 256
"""Sequences that are laid out in one go; more take memory and gain nothing."""
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
        self.packer = make_packer(
            settings.packing, settings.sequence_length, tokenizer.pad_id, self.dtype
        )
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
        rests: list[Piece] = []
        if keep_rests:
            room = self.settings.sequence_length // ROOM_SHARE
            rests = [piece for one in self._packed if one.padding > room for piece in one.pieces()]
            self._packed = [one for one in self._packed if one.padding <= room]
        random.Random(f"{self.settings.seed} {self.split} {self.task}").shuffle(self._packed)
        first = 0
        while first < len(self._packed):
            count = self._shard_size(first)
            self._write(folder, prefix, first, self._packed[first : first + count])
            first += count
        self._packed.clear()
        done = self._written
        done.cut_documents = self.packer.cut_documents
        done.cut_though_fitting = self.packer.cut_though_fitting
        done.cuts = self.packer.cuts
        return done, rests

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
        layouts = stored_layouts(
            self.settings, (SPLITS.index(self.split), self.task, first),
            packed,
        )  # fmt: skip
        apart = self.settings.layout.loss_span == RESPONSE
        pairs = zip(packed, layouts, strict=True)
        sequences = [as_sequence(*pair, with_prompts=apart) for pair in pairs]
        padding = sum(one.padding for one in packed)
        name = f"{prefix}{len(self._written.shards):03d}.tar"
        info, offsets = write_shard(
            folder / name, name, sequences, padding, self.settings.group_size
        )
        self._written.shards.append(info)
        self._written.offsets.append(offsets)
        self._count((one.tokens for one in packed), padding)

    def _count(self, tokens: Iterable[NDArray[np.integer]], padding: int) -> None:
        # Once a shard, not for each document: a count takes time in proportion to the vocabulary.
        counts = np.bincount(np.concatenate(list(tokens)), minlength=len(self.token_counts))
        self.token_counts += counts
        self.token_counts[self.packer.pad_id] -= padding


def as_sequence(packed: Packed, layout: Layout, *, with_prompts: bool = False) -> PackedSequence:
    """What a shard stores: padding has become a last document."""
    padding = [packed.padding] if packed.padding else []
    lengths = np.array([*packed.document_lengths, *padding])
    prompts = np.array([*packed.prompts, *(0 for _ in padding)]) if with_prompts else None
    return PackedSequence(packed.tokens, lengths, layout, np.array(packed.continued), prompts)


def stored_layouts(
    settings: PrepareSettings, key: tuple[int, int, int], packed: Sequence[Packed]
) -> list[Layout]:
    """The layouts of these sequences, padding left out of each.

    Each has a random stream of its own, keyed by the seed, `key` (the split's number, the task's,
    and the first sequence's in the task), and its place behind the first.
    """
    choice, mixed = settings.layout, settings.layout.mixed()
    document_lengths = [one.document_lengths for one in packed]
    drawn = choice.coverage < 1.0 or choice.shift or mixed is not None
    if not drawn and choice.loss_span != RESPONSE:
        return [
            layout
            for start in range(0, len(document_lengths), TOGETHER)
            for layout in _aligned_layouts(
                document_lengths[start : start + TOGETHER], choice.block_size
            )
        ]
    split, task, first = key
    streams = (
        np.random.default_rng([settings.seed, split, task, first + number])
        for number in range(len(packed))
    )
    return [
        build_layout(
            one.document_lengths,
            mixed.draw(rng) if mixed else choice.block_size,
            coverage=choice.coverage,
            shift=choice.shift,
            rng=rng,
            prompt_lengths=one.prompts,
        )
        for one, rng in zip(packed, streams, strict=True)
    ]


def _aligned_layouts(document_lengths: Sequence[list[int]], block_size: int) -> list[Layout]:
    """`build_layout` of each, at the price of one: nothing is drawn, so the sequences can be laid
    out as one long one, of which each takes its rows."""
    whole = build_layout([n for lengths in document_lengths for n in lengths], block_size).table()
    ends = np.cumsum([sum(lengths) for lengths in document_lengths])
    last_rows = np.searchsorted(whole[:, 2], ends, side="right")
    layouts, row, start = [], 0, 0
    for end, last_row in zip(ends.tolist(), last_rows.tolist(), strict=True):
        # At full coverage a block's slots stand where its positions do, so one offset moves all.
        layouts.append(Layout(*(whole[row:last_row] - start).T))
        row, start = last_row, end
    return layouts
