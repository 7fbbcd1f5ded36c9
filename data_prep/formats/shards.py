"""Shards: tar files of packed sequences that plain `webdataset.WebDataset(path)` reads.

A sample is a group of n packed sequences: `tokens.npy` [n, S], `document_lengths.npy` [n, D] padded
with 0, `layout.npy` [n, B, 4] padded with rows of zeros, `continued.npy` [n, D], each in the
smallest unsigned type. Where prompts are told apart, `prompt_lengths.npy` [n, D] as well.
"""

import hashlib
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from data_prep.formats.groups import (
    TOKENS,
    Arrays,
    Bytes,
    PackedGroup,
    PackedSequence,
    decode_group,
    npy_form,
)
from data_prep.formats.manifest import ShardInfo
from tidar_common.errors import UserError
from tidar_common.files import written_atomically

OCTAL = re.compile(rb"([0-7]+)[ \0]*")
HEADER = tarfile.TarInfo("-").tobuf(tarfile.USTAR_FORMAT)
SIZE_AT, CHECKSUM_AT = slice(124, 136), slice(148, 156)
SAME_IN_ALL = (slice(100, 124), slice(136, 148), slice(156, None))
"""What headers that `write_shard` writes have in common: all but name, size and checksum."""
MEMBER_NAME = re.compile(r"\d+\.(tokens|document_lengths|layout|continued|prompt_lengths)\.npy")


def write_shard(
    path: Path, name: str, groups: Iterable[Arrays], padding: int
) -> tuple[ShardInfo, list[int]]:
    """Write `groups` (which hold `padding` tokens of padding) to `path`, all or nothing.

    Returns:
        tuple: the manifest's entry, and the byte at which each group starts, with that at which
            the last one ends behind them.
    """
    hashed = _Hashed()
    offsets = []
    sequences = total = 0
    # The file beside it that lists the shard comes next, and syncs the folder for both.
    with written_atomically(path, sync_folder=False) as file:
        hashed.file = file
        for number, group in enumerate(groups):
            offsets.append(hashed.size)
            count, length = group[TOKENS].shape
            sequences, total = sequences + count, total + count * length
            for member, array in group.items():
                # Written whole: TarFile would copy it in small pieces.
                header, values = npy_form(array)
                size = len(header) + values.nbytes
                hashed.write(_member_header(f"{number:08d}.{member}", size) + header)
                hashed.write(values)
                hashed.fill(tarfile.BLOCKSIZE)
        offsets.append(hashed.size)
        hashed.write(bytes(2 * tarfile.BLOCKSIZE))
        hashed.fill(tarfile.RECORDSIZE)
    digest = hashed.digest.hexdigest()
    info = ShardInfo(name, sequences, total - padding, padding, hashed.size, digest)
    return info, offsets


def _member_header(name: str, size: int) -> bytes:
    """`tarfile.TarInfo(name).tobuf()` for a file of `size` bytes, in a fifth of the time.

    The defaults of TarInfo name no time, owner or host: the bytes depend on the content alone.
    """
    if size >= 8**11:
        raise ValueError(f"{name} has {size:,} bytes, more than a tar header can say")
    header = bytearray(HEADER)
    header[: len(name)] = name.encode()
    header[SIZE_AT] = b"%011o\0" % size
    header[CHECKSUM_AT] = b" " * 8
    header[CHECKSUM_AT] = b"%06o\0 " % sum(header)
    return bytes(header)


class _Hashed:
    """A file that is only written forwards, and hashed on the way."""

    file: BinaryIO

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, content: Bytes) -> None:
        view = memoryview(content)
        self.digest.update(view)
        self.size += view.nbytes
        self.file.write(view)

    def fill(self, unit: int) -> None:
        """Write zeros up to a multiple of `unit` bytes."""
        self.write(bytes(-self.size % unit))


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

    def read_group(self, number: int) -> PackedGroup:
        """The sequences of group `number`; raises UserError naming the shard when damaged."""
        try:
            start, end = int(self._offsets[number]), int(self._offsets[number + 1])
            if self._file is None:
                self._file = os.open(self.path, os.O_RDONLY)
            content = np.empty(end - start, dtype=np.uint8)
            if os.preadv(self._file, [content.data], start) < len(content):
                raise EOFError("it ends early")
            return decode_group(tar_members(content.data))
        except (OSError, ValueError, IndexError, EOFError, MemoryError, tarfile.TarError) as error:
            raise damaged(self.path, error) from error

    def close(self) -> None:
        """Close the file, which the first read opened; another read opens it again."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __del__(self) -> None:
        self.close()


def tar_members(content: memoryview) -> dict[str, memoryview]:
    """The members of one group out of its bytes, by what follows the first dot of their names."""
    members = {}
    position = 0
    while position < len(content):
        name, size = _name_and_size(bytes(content[position : position + tarfile.BLOCKSIZE]))
        start = position + tarfile.BLOCKSIZE
        if not 0 <= size <= len(content) - start:
            raise EOFError("a member ends behind its group")
        members[name.partition(".")[2]] = content[start : start + size]
        position = start + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return members


def _name_and_size(header: bytes) -> tuple[str, int]:
    """Of the member behind a tar header, which must be one that shards have.

    A header as `write_shard` writes it is read here, in a fraction of the time that tarfile takes:
    but for name, size and checksum all are alike. Others are left to tarfile.
    """
    name = header[:100].rstrip(b"\0").decode("latin-1")
    size, checksum = (OCTAL.fullmatch(header[part]) for part in (SIZE_AT, CHECKSUM_AT))
    ours = all(header[part] == HEADER[part] for part in SAME_IN_ALL)
    if ours and size and checksum and len(header) == tarfile.BLOCKSIZE:
        total = sum(header) - sum(header[CHECKSUM_AT]) + 8 * ord(" ")
        if total == int(checksum[1], 8) and MEMBER_NAME.fullmatch(name):
            return name, int(size[1], 8)
    member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    check_member(member)
    return member.name, member.size


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


def damaged(path: Path | str, error: Exception) -> UserError:
    """What is said of a shard that cannot be read."""
    return UserError(f"{path}: missing or damaged shard ({error}); run tidar-prepare again")
