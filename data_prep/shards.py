"""Shards: tar files of packed sequences that plain `webdataset.WebDataset(path)` reads.

A sample is a group of n packed sequences: `tokens.npy` [n, S], `document_lengths.npy` [n, D] padded
with 0, `layout.npy` [n, B, 4] padded with rows of zeros, `continued.npy` [n, D], each in the
smallest unsigned type. Where prompts are told apart, `prompt_lengths.npy` [n, D] as well.
"""

import hashlib
import io
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.files import written_atomically
from data_prep.layout import COLUMNS, Layout
from data_prep.manifest import ShardInfo

MEMBER_NAME = re.compile(r"\d+\.(tokens|document_lengths|layout|continued|prompt_lengths)\.npy")
MEMBERS = ("tokens.npy", "document_lengths.npy", "layout.npy", "continued.npy")
PROMPTS = "prompt_lengths.npy"


@dataclass(frozen=True)
class PackedSequence:
    """Exactly `sequence_length` tokens of whole documents, and how they are laid out."""

    tokens: NDArray[np.integer]
    """[S]"""
    document_lengths: NDArray[np.integer]
    """[D], sum S; padding, if any, is a last pseudo-document that starts with the pad id."""
    layout: Layout
    continued: NDArray[np.bool_] | None = None
    """[D]: documents that go on from a cut, begun in another sequence; None is none of them."""
    prompt_lengths: NDArray[np.integer] | None = None
    """[D]: tokens at each document's start that carry no loss; None where all carry one."""

    def real_tokens(self, pad_id: int) -> int:
        """Tokens before the padding: a last document that starts with `pad_id` is padding."""
        total, last = len(self.tokens), int(self.document_lengths[-1])
        return total - last if int(self.tokens[total - last]) == pad_id else total


def write_shard(
    path: Path, name: str, sequences: Sequence[PackedSequence], padding: int, group_size: int
) -> tuple[ShardInfo, list[int]]:
    """Write `sequences` (which hold `padding` tokens of padding) to `path`, all or nothing.

    Returns:
        tuple: the manifest's entry, and the byte at which each group starts, with that at which
            the last one ends behind them.
    """
    hashed = _Hashed()
    offsets = []
    with written_atomically(path) as file:
        hashed.file = file
        for number, start in enumerate(range(0, len(sequences), group_size)):
            offsets.append(hashed.size)
            group = encode_group(sequences[start : start + group_size])
            for member, content in group.items():
                # The defaults of TarInfo name no time, owner or host: the bytes depend on the
                # content alone. Written whole: TarFile would copy it in small pieces.
                entry = tarfile.TarInfo(f"{number:08d}.{member}")
                entry.size = len(content)
                hashed.write(entry.tobuf(tarfile.USTAR_FORMAT))
                hashed.write(content)
                hashed.fill(tarfile.BLOCKSIZE)
        offsets.append(hashed.size)
        hashed.write(bytes(2 * tarfile.BLOCKSIZE))
        hashed.fill(tarfile.RECORDSIZE)
    total = sum(len(sequence.tokens) for sequence in sequences)
    digest = hashed.digest.hexdigest()
    info = ShardInfo(name, len(sequences), total - padding, padding, hashed.size, digest)
    return info, offsets


class _Hashed:
    """A file that is only written forwards, and hashed on the way."""

    file: BinaryIO

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, content: bytes) -> None:
        self.digest.update(content)
        self.size += len(content)
        self.file.write(content)

    def fill(self, unit: int) -> None:
        """Write zeros up to a multiple of `unit` bytes."""
        self.write(bytes(-self.size % unit))


def encode_group(group: Sequence[PackedSequence]) -> dict[str, bytes]:
    """The members of one sample."""
    documents = max(len(sequence.document_lengths) for sequence in group)
    blocks = max(sequence.layout.num_blocks for sequence in group)
    lengths = np.zeros((len(group), documents), dtype=np.int32)
    layouts = np.zeros((len(group), blocks, len(COLUMNS)), dtype=np.int32)
    continued = np.zeros((len(group), documents), dtype=np.uint8)
    for row, sequence in enumerate(group):
        lengths[row, : len(sequence.document_lengths)] = sequence.document_lengths
        for column, name in enumerate(COLUMNS):
            layouts[row, : sequence.layout.num_blocks, column] = getattr(sequence.layout, name)
        if sequence.continued is not None:
            continued[row, : len(sequence.continued)] = sequence.continued
    tokens = np.stack([sequence.tokens for sequence in group])
    arrays: dict[str, NDArray[np.integer]] = dict(
        zip(MEMBERS, (tokens, lengths, layouts, continued), strict=True)
    )
    if any(sequence.prompt_lengths is not None for sequence in group):
        arrays[PROMPTS] = prompts = np.zeros_like(lengths)
        for row, sequence in enumerate(group):
            if sequence.prompt_lengths is not None:
                prompts[row, : len(sequence.prompt_lengths)] = sequence.prompt_lengths
    return {name: _npy_bytes(array) for name, array in arrays.items()}


def decode_group(sample: dict[str, bytes]) -> list[PackedSequence]:
    """The sequences of one sample, its members as bytes.

    Raises:
        ValueError: when members are missing or do not fit together.
    """
    missing = [name for name in MEMBERS if name not in sample]
    if missing:
        raise ValueError(f"members missing: {', '.join(missing)}")
    tokens, lengths, layouts, continued = (
        np.load(io.BytesIO(sample[name]), allow_pickle=False) for name in MEMBERS
    )
    if not len(tokens) == len(lengths) == len(layouts) or lengths.shape != continued.shape:
        raise ValueError("members with different numbers of sequences")
    if not (lengths.sum(1) == tokens.shape[1]).all():
        raise ValueError("document lengths that do not add up to the sequence length")
    prompts = None
    if PROMPTS in sample:
        prompts = np.load(io.BytesIO(sample[PROMPTS]), allow_pickle=False)
        if prompts.shape != lengths.shape or (prompts > lengths).any():
            raise ValueError("prompts that do not fit their documents")
    sequences = []
    for row in range(len(tokens)):
        own = lengths[row] > 0
        layout = Layout.from_table(layouts[row])
        marks = continued[row][own].astype(bool)
        prompt = None if prompts is None else prompts[row][own]
        sequences.append(PackedSequence(tokens[row], lengths[row][own], layout, marks, prompt))
    return sequences


class ShardReader:
    """Reads the groups of a local shard in any order, each in one piece.

    Args:
        path: the tar.
        offsets: where its groups start, and behind them where the last one ends, as the data
            folder's index has them; without, the tar is scanned once.
    """

    def __init__(
        self, path: Path, offsets: Sequence[int] | NDArray[np.int64] | None = None
    ) -> None:
        self.path = path
        self._file: int | None = None
        self._offsets = group_offsets(path) if offsets is None else offsets

    @property
    def num_groups(self) -> int:
        return len(self._offsets) - 1

    def read_group(self, number: int) -> list[PackedSequence]:
        """The sequences of group `number`; raises UserError naming the shard when damaged."""
        try:
            start, end = int(self._offsets[number]), int(self._offsets[number + 1])
            if self._file is None:
                self._file = os.open(self.path, os.O_RDONLY)
            content = os.pread(self._file, end - start, start)
            if len(content) < end - start:
                raise EOFError("it ends early")
            return decode_group(tar_members(content))
        except (OSError, ValueError, IndexError, EOFError, MemoryError, tarfile.TarError) as error:
            raise damaged(self.path, error) from error

    def close(self) -> None:
        """Close the file, which the first read opened; another read opens it again."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __del__(self) -> None:
        self.close()


def tar_members(content: bytes) -> dict[str, bytes]:
    """The members of one group out of its bytes, by what follows the first dot of their names."""
    members = {}
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        for member in tar:
            check_member(member)
            name = member.name.partition(".")[2]
            members[name] = content[member.offset_data : member.offset_data + member.size]
    return members


def check_member(member: tarfile.TarInfo) -> None:
    """Raise ValueError for anything that `write_shard` never writes: a link, a device, a folder, an
    extended header, or a name that is not that of an array of a group."""
    plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.pax_headers
    if not plain:
        raise ValueError(f"member {member.name!r} is no plain file")
    if not MEMBER_NAME.fullmatch(member.name):
        raise ValueError(f"member {member.name!r} has a name that no shard has")


def group_offsets(path: Path) -> list[int]:
    """Where the groups of a shard start, and the last one ends, by a scan of its headers."""
    starts: dict[str, int] = {}
    end = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                check_member(member)
                starts.setdefault(member.name.partition(".")[0], member.offset)
                end = member.offset_data + -(-member.size // 512) * 512
    except (OSError, ValueError, tarfile.TarError) as error:
        raise damaged(path, error) from error
    return [*starts.values(), end]


def read_shard(path: Path) -> Iterator[PackedSequence]:
    """All sequences of a shard in order, through webdataset; UserError when damaged."""
    import webdataset  # here, for it imports torch

    group_offsets(path)  # webdataset passes over members that no shard has
    dataset = webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
    try:
        for sample in dataset:
            yield from decode_group(sample)
    except (OSError, ValueError, EOFError, MemoryError, tarfile.TarError) as error:
        raise damaged(path, error) from error


def _npy_bytes(array: NDArray[np.integer]) -> bytes:
    """The `.npy` form of `array` in the smallest unsigned type that holds its values."""
    kind = np.min_scalar_type(int(array.max(initial=0)))
    buffer = io.BytesIO()
    np.save(buffer, array.astype(kind, copy=False), allow_pickle=False)
    return buffer.getvalue()


def damaged(path: Path | str, error: Exception) -> UserError:
    """What is said of a shard that cannot be read."""
    return UserError(f"{path}: missing or damaged shard ({error}); run tidar-prepare again")
