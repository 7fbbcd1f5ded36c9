"""Shards: tar files of packed sequences that plain `webdataset.WebDataset(path)` reads.

A sample is a group of n packed sequences: `tokens.npy` [n, S], `document_lengths.npy` [n, D] padded
with 0, `layout.npy` [n, B, 4] padded with rows of zeros, each in the smallest unsigned type.
"""

import hashlib
import io
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.files import written_atomically
from data_prep.layout import COLUMNS, Layout
from data_prep.manifest import ShardInfo

MEMBERS = ("tokens.npy", "document_lengths.npy", "layout.npy")
MTIME = 0.0
"""Fixed, or two runs would not be byte-identical."""


@dataclass(frozen=True)
class PackedSequence:
    """Exactly `sequence_length` tokens of whole documents, and how they are laid out."""

    tokens: NDArray[np.integer]
    """[S]"""
    document_lengths: NDArray[np.integer]
    """[D], sum S; padding, if any, is a last pseudo-document that starts with the pad id."""
    layout: Layout

    def real_tokens(self, pad_id: int) -> int:
        """Tokens before the padding: a last document that starts with `pad_id` is padding."""
        total, last = len(self.tokens), int(self.document_lengths[-1])
        return total - last if int(self.tokens[total - last]) == pad_id else total


def write_shard(
    path: Path, name: str, sequences: Sequence[PackedSequence], padding: int, group_size: int
) -> ShardInfo:
    """Write `sequences` (which hold `padding` tokens of padding) to `path`, all or nothing.

    A file that holds just these bytes already is left alone.
    """
    content = shard_bytes(sequences, group_size)
    if not _holds(path, content):
        with written_atomically(path) as file:
            file.write(content)
    total = sum(len(sequence.tokens) for sequence in sequences)
    digest = hashlib.sha256(content).hexdigest()
    return ShardInfo(name, len(sequences), total - padding, padding, len(content), digest)


def shard_bytes(sequences: Sequence[PackedSequence], group_size: int) -> bytes:
    """The tar file; a function of its arguments only."""
    # Imported where it is used: it imports torch, which costs seconds and every worker 200 MB.
    import webdataset

    buffer = io.BytesIO()
    writer = webdataset.TarWriter(buffer, encoder=False, mtime=MTIME, user="", group="")
    for number, start in enumerate(range(0, len(sequences), group_size)):
        group = sequences[start : start + group_size]
        writer.write({"__key__": f"{number:08d}", **encode_group(group)})
    writer.close()
    return buffer.getvalue()


def _holds(path: Path, content: bytes) -> bool:
    try:
        return path.stat().st_size == len(content) and path.read_bytes() == content
    except OSError:
        return False


def encode_group(group: Sequence[PackedSequence]) -> dict[str, bytes]:
    """The members of one sample."""
    documents = max(len(sequence.document_lengths) for sequence in group)
    blocks = max(sequence.layout.num_blocks for sequence in group)
    lengths = np.zeros((len(group), documents), dtype=np.int32)
    layouts = np.zeros((len(group), blocks, len(COLUMNS)), dtype=np.int32)
    for row, sequence in enumerate(group):
        lengths[row, : len(sequence.document_lengths)] = sequence.document_lengths
        for column, name in enumerate(COLUMNS):
            layouts[row, : sequence.layout.num_blocks, column] = getattr(sequence.layout, name)
    tokens = np.stack([sequence.tokens for sequence in group])
    arrays = zip(MEMBERS, (tokens, lengths, layouts), strict=True)
    return {name: _npy_bytes(array) for name, array in arrays}


def decode_group(sample: dict[str, bytes]) -> list[PackedSequence]:
    """The sequences of one sample, its three members as bytes.

    Raises:
        ValueError: when members are missing or do not fit together.
    """
    missing = [name for name in MEMBERS if name not in sample]
    if missing:
        raise ValueError(f"members missing: {', '.join(missing)}")
    tokens, lengths, layouts = (
        np.load(io.BytesIO(sample[name]), allow_pickle=False) for name in MEMBERS
    )
    if not len(tokens) == len(lengths) == len(layouts):
        raise ValueError("members with different numbers of sequences")
    if not (lengths.sum(1) == tokens.shape[1]).all():
        raise ValueError("document lengths that do not add up to the sequence length")
    return [
        PackedSequence(tokens[row], lengths[row][lengths[row] > 0], Layout.from_table(layouts[row]))
        for row in range(len(tokens))
    ]


class ShardReader:
    """Reads the groups of a local shard in any order; the tar is indexed once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._groups: dict[str, dict[str, tuple[int, int]]] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    key, _, name = member.name.partition(".")
                    self._groups.setdefault(key, {})[name] = (member.offset_data, member.size)
        except (OSError, tarfile.TarError) as error:
            raise _damaged(path, error) from error
        self._keys = sorted(self._groups)

    @property
    def num_groups(self) -> int:
        return len(self._keys)

    def read_group(self, number: int) -> list[PackedSequence]:
        """The sequences of group `number`; raises UserError naming the shard when damaged."""
        try:
            with self.path.open("rb") as file:
                sample = {}
                for name, (offset, size) in self._groups[self._keys[number]].items():
                    file.seek(offset)
                    sample[name] = file.read(size)
            return decode_group(sample)
        except (OSError, ValueError, IndexError, EOFError) as error:
            raise _damaged(self.path, error) from error


def read_shard(path: Path) -> Iterator[PackedSequence]:
    """All sequences of a shard in order, through webdataset; UserError when damaged."""
    import webdataset  # see shard_bytes

    dataset = webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
    try:
        for sample in dataset:
            yield from decode_group(sample)
    except (OSError, ValueError, EOFError, tarfile.TarError) as error:
        raise _damaged(path, error) from error


def _npy_bytes(array: NDArray[np.integer]) -> bytes:
    """The `.npy` form of `array` in the smallest unsigned type that holds its values."""
    kind = np.min_scalar_type(int(array.max(initial=0)))
    buffer = io.BytesIO()
    np.save(buffer, array.astype(kind), allow_pickle=False)
    return buffer.getvalue()


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: missing or damaged shard ({error}); run tidar-prepare again")
