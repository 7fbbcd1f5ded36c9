"""One split on its way to shards: packed, shuffled, laid out, written, counted."""

import hashlib
import json
import random
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.encoding import Encoded
from data_prep.files import sha256_of, write_text_atomic
from data_prep.layout import Layout, build_layout
from data_prep.manifest import SPLITS, ShardInfo, Split
from data_prep.packing import Packed, Packer
from data_prep.settings import PrepareSettings
from data_prep.shards import PackedSequence, write_shard
from data_prep.tokenizers import Tokenizer

DONE_FOLDER = ".done"


class SplitWriter:
    """Takes documents of one split; everything it does is a function of their order and the seed.

    A shard that an interrupted run has finished is recorded under `.done/`, with the hash of the
    config and of the sequences that went into it; the same shard is then not written again.
    """

    def __init__(self, settings: PrepareSettings, split: str, tokenizer: Tokenizer) -> None:
        self.settings = settings
        self.split = split
        self.eos_id = tokenizer.eos_id
        self.token_counts: NDArray[np.int64] = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        self.packer = Packer(settings.sequence_length, tokenizer.pad_id)
        self.documents = 0
        self.text_bytes = 0
        self._rng = random.Random(f"{settings.seed} {split}")
        self._shuffled: list[Packed] = []
        self._waiting: list[Packed] = []
        self._shards: list[ShardInfo] = []
        self._sequences = 0

    def add(self, document: Encoded) -> None:
        """Take one document and put the end token behind it."""
        self.documents += 1
        self.text_bytes += document.text_bytes
        whole = [*document.ids, self.eos_id]
        self.token_counts += np.bincount(whole, minlength=len(self.token_counts))
        self._shuffle(self.packer.add(whole))

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
        name = f"{self.split}/{len(self._shards):06d}.tar"
        path = self.settings.output_dir / name
        record = self.settings.output_dir / DONE_FOLDER / f"{name.replace('/', '-')}.json"
        source_hash = self._source_hash()
        info = finished_shard(path, record, source_hash)
        if info is None:
            sequences = [self._lay_out(packed, i) for i, packed in enumerate(self._waiting)]
            padding = sum(packed.padding for packed in self._waiting)
            info = write_shard(path, name, sequences, padding, self.settings.group_size)
            content = {"source_hash": source_hash, "shard": asdict(info)}
            write_text_atomic(record, json.dumps(content))
        self._shards.append(info)
        self._sequences += len(self._waiting)
        self._waiting.clear()

    def _source_hash(self) -> str:
        """Of all that decides the bytes of the shard that is due."""
        digest = hashlib.sha256(f"{self.settings.config_hash} {self._sequences}".encode())
        for packed in self._waiting:
            digest.update(packed.tokens.tobytes())
            digest.update(np.array(packed.document_lengths).tobytes())
        return digest.hexdigest()

    def _lay_out(self, packed: Packed, offset: int) -> PackedSequence:
        number = self._sequences + offset
        layout = stored_layout(self.settings, self.split, number, packed.document_lengths)
        padding = [packed.padding] if packed.padding else []
        lengths = np.array([*packed.document_lengths, *padding])
        return PackedSequence(packed.tokens, lengths, layout)


def stored_layout(
    settings: PrepareSettings, split: str, number: int, document_lengths: list[int]
) -> Layout:
    """The layout of the split's sequence `number`, from its own random stream."""
    rng = np.random.default_rng([settings.seed, SPLITS.index(split), number])
    choice = settings.layout
    return build_layout(
        document_lengths, choice.block_size, coverage=choice.coverage, shift=choice.shift, rng=rng
    )


def finished_shard(path: Path, record: Path, source_hash: str) -> ShardInfo | None:
    """The shard at `path` if `record` says it was made from this source, and it is undamaged."""
    try:
        content = json.loads(record.read_text())
        info = ShardInfo(**content["shard"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    intact = path.is_file() and path.stat().st_size == info.bytes and sha256_of(path) == info.sha256
    return info if intact and content["source_hash"] == source_hash else None
