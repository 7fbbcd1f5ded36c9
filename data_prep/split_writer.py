"""One split on its way to shards: packed, shuffled, laid out, written, counted."""

import random
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from data_prep.encoding import Encoded
from data_prep.layout import Layout, build_layout
from data_prep.manifest import SPLITS, ShardInfo, Split
from data_prep.packing import Packed, Packer
from data_prep.settings import PrepareSettings
from data_prep.shards import PackedSequence, write_shard
from data_prep.tokenizers import Tokenizer


class SplitWriter:
    """Takes documents of one split; everything it does is a function of their order and the seed.

    So a run after an interrupted one comes to the same shards; those that are there are kept.
    """

    def __init__(self, settings: PrepareSettings, split: str, tokenizer: Tokenizer) -> None:
        self.settings = settings
        self.split = split
        self.token_counts: NDArray[np.int64] = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        """How often each id stands in the finished shards, padding left out."""
        self.packer = Packer(settings.sequence_length, tokenizer.pad_id)
        self.documents = 0
        self.text_bytes = 0
        self._eos = np.array([tokenizer.eos_id], dtype=np.int32)
        self._rng = random.Random(f"{settings.seed} {split}")
        self._shuffled: list[Packed] = []
        self._waiting: list[Packed] = []
        self._shards: list[ShardInfo] = []
        self._sequences = 0

    def add(self, document: Encoded) -> None:
        """Take one document and put the end token behind it."""
        self.documents += 1
        self.text_bytes += document.text_bytes
        self._shuffle(self.packer.add(np.concatenate((document.ids, self._eos))))

    def finish(self) -> Split:
        """Write what is left and return the split's totals."""
        self._shuffle(self.packer.finish())
        self._rng.shuffle(self._shuffled)
        for packed in self._shuffled:
            self._write(packed)
        self._shuffled.clear()
        self._flush()
        return Split(
            shards=tuple(self._shards),
            documents=self.documents,
            text_bytes=self.text_bytes,
            sequences=self._sequences,
            tokens=sum(shard.tokens for shard in self._shards),
            padding=sum(shard.padding for shard in self._shards),
            cut_documents=self.packer.cut_documents,
            cuts=self.packer.cuts,
        )

    def _shuffle(self, done: Iterable[Packed]) -> None:
        """A shuffle buffer: neighbours in a shard, and so in a batch, come from far apart."""
        for packed in done:
            if len(self._shuffled) < self.settings.shuffle_sequences:
                self._shuffled.append(packed)
                continue
            slot = self._rng.randrange(len(self._shuffled))
            packed, self._shuffled[slot] = self._shuffled[slot], packed
            self._write(packed)

    def _write(self, packed: Packed) -> None:
        self._waiting.append(packed)
        if len(self._waiting) == self.settings.shard_sequences:
            self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        lengths = [packed.document_lengths for packed in self._waiting]
        layouts = stored_layouts(self.settings, self.split, self._sequences, lengths)
        sequences = []
        for packed, layout in zip(self._waiting, layouts, strict=True):
            padding = [packed.padding] if packed.padding else []
            with_padding = np.array([*packed.document_lengths, *padding])
            sequences.append(PackedSequence(packed.tokens, with_padding, layout))
        padding_tokens = sum(packed.padding for packed in self._waiting)
        name = f"{self.split}/{len(self._shards):06d}.tar"
        path = self.settings.output_dir / name
        info = write_shard(path, name, sequences, padding_tokens, self.settings.group_size)
        self._shards.append(info)
        self._count(padding_tokens)
        self._sequences += len(self._waiting)
        self._waiting.clear()

    def _count(self, padding: int) -> None:
        # Once a shard, not for each document: a count takes time in proportion to the vocabulary.
        tokens = np.concatenate([packed.tokens for packed in self._waiting])
        self.token_counts += np.bincount(tokens, minlength=len(self.token_counts))
        self.token_counts[self.packer.pad_id] -= padding


def stored_layouts(
    settings: PrepareSettings, split: str, first: int, document_lengths: Sequence[list[int]]
) -> list[Layout]:
    """The layouts of the split's sequences `first`, `first + 1`, …, padding left out of each.

    Each sequence has a random stream of its own, keyed by (seed, split, number in the split).
    """
    choice = settings.layout
    if choice.coverage == 1.0 and not choice.shift:
        return _aligned_layouts(document_lengths, choice.block_size)
    streams = (
        np.random.default_rng([settings.seed, SPLITS.index(split), first + number])
        for number in range(len(document_lengths))
    )
    return [
        build_layout(
            lengths, choice.block_size, coverage=choice.coverage, shift=choice.shift, rng=rng
        )
        for lengths, rng in zip(document_lengths, streams, strict=True)
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
