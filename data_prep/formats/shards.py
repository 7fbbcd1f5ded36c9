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
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from data_prep.formats.groups import TOKENS, Arrays, PackedGroup, PackedSequence, decode_group
from data_prep.formats.manifest import ShardInfo
from tidar_common.errors import UserError
from tidar_common.files import written_atomically

COPIED_BYTES = 1 << 20
"""What tarfile writes at a time; at its own 16 KB writing takes a third longer."""
LOOKED_AT_ONCE = 32
"""Shards whose sizes are asked for side by side: a network file system takes its time for each."""
MEMBER_NAME = re.compile(r"\d+\.(tokens|document_lengths|layout|continued|prompt_lengths)\.npy")


def write_shard(
    path: Path, name: str, groups: Iterable[Arrays], padding: int
) -> tuple[ShardInfo, list[int]]:
    """Write `groups` (which hold `padding` tokens of padding) to `path`, all or nothing.

    Returns:
        tuple: the manifest's entry, and the byte at which each group starts, with that at which
            the last one ends behind them.
    """
    offsets = []
    sequences = total = 0
    # The file beside it that lists the shard comes next, and syncs the folder for both.
    with written_atomically(path, sync_folder=False) as file:
        hashed = _HashedFile(file)
        with tarfile.TarFile(
            fileobj=hashed, mode="w", format=tarfile.USTAR_FORMAT, copybufsize=COPIED_BYTES
        ) as tar:
            for number, group in enumerate(groups):
                offsets.append(hashed.tell())
                count, length = group[TOKENS].shape
                sequences, total = sequences + count, total + count * length
                for member, array in group.items():
                    content = io.BytesIO()
                    np.save(content, array, allow_pickle=False)
                    # A TarInfo names no time, owner or host: the bytes depend on the arrays alone.
                    entry = tarfile.TarInfo(f"{number:08d}.{member}")
                    entry.size = content.tell()
                    content.seek(0)
                    tar.addfile(entry, content)
            offsets.append(hashed.tell())
    digest = hashed.digest.hexdigest()
    info = ShardInfo(name, sequences, total - padding, padding, hashed.size, digest)
    return info, offsets


class _HashedFile(io.RawIOBase):
    """A file that is only written forwards, and hashed on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self.digest = hashlib.sha256()
        self.size = 0
        self._file = file

    def write(self, content: bytes) -> int:  # type: ignore[override]
        self.digest.update(content)
        self.size += len(content)
        return self._file.write(content)

    def tell(self) -> int:
        return self.size


class _Member(tarfile.TarInfo):
    """The header of a shard's member. What `write_shard` never writes is refused as soon as it is
    read, before tarfile acts on it: links, devices, folders, extended headers, other names."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Member":
        member = super().frombuf(buf, encoding, errors)
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            raise ValueError(f"member {member.name!r} is no plain file")
        if not MEMBER_NAME.fullmatch(member.name):
            raise ValueError(f"member {member.name!r} has a name that no shard has")
        if member.size < 0:
            raise ValueError(f"member {member.name!r} has a size below zero")
        return member

    @property
    def end(self) -> int:
        """Where the next header starts."""
        return self.offset_data + -(-self.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


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
            content = os.pread(self._file, end - start, start)
            if len(content) < end - start:
                raise EOFError("it ends early")
            return decode_group(_arrays_by_name(content))
        except (OSError, ValueError, IndexError, EOFError, MemoryError, tarfile.TarError) as error:
            raise damaged(self.path, error) from error

    def close(self) -> None:
        """Close the file, which the first read opened; another read opens it again."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __del__(self) -> None:
        self.close()


def _arrays_by_name(content: bytes) -> dict[str, bytes]:
    """The members of one group out of its bytes, by what follows the first dot of their names."""
    members, end = {}, 0
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:", tarinfo=_Member) as tar:
        for member in tar:
            assert isinstance(member, _Member), "the class that tar was given"
            members[member.name.partition(".")[2]] = content[
                member.offset_data : member.offset_data + member.size
            ]
            end = member.end
    if end != len(content):  # tarfile stops at a header that it cannot read, and says nothing
        raise EOFError("a member is cut short or has a damaged header")
    return members


def group_offsets(path: Path) -> list[int]:
    """Where the groups of a shard start, and the last one ends, by a scan of its headers."""
    starts: dict[str, int] = {}
    end = 0
    try:
        with tarfile.open(path, "r:", tarinfo=_Member) as tar:
            for member in tar:
                assert isinstance(member, _Member), "the class that tar was given"
                starts.setdefault(member.name.partition(".")[0], member.offset)
                end = member.end
    except (OSError, ValueError, tarfile.TarError) as error:
        raise damaged(path, error) from error
    return [*starts.values(), end]


def read_shard(path: Path) -> Iterator[PackedSequence]:
    """All sequences of a shard in order; UserError when damaged."""
    reader = ShardReader(path)
    for number in range(reader.num_groups):
        yield from reader.read_group(number)


def wrong_sizes(data_dir: Path, shards: Sequence[ShardInfo]) -> list[str]:
    """What can be known of `shards` without reading them: a line for each that is not there with
    the size that the manifest gives, in their order."""

    def look(shard: ShardInfo) -> str | None:
        path = data_dir / shard.name
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            return f"{path} is missing"
        except OSError as error:
            return f"{path} cannot be read ({error.strerror})"
        if size != shard.bytes:
            return f"{path} has {size} bytes, the manifest says {shard.bytes}"
        return None

    with ThreadPoolExecutor(LOOKED_AT_ONCE) as pool:
        return [line for line in pool.map(look, shards) if line is not None]


def damaged(path: Path | str, error: Exception) -> UserError:
    """What is said of a shard that cannot be read."""
    return UserError(f"{path}: missing or damaged shard ({error}); run tidar-prepare again")
