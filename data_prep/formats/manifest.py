"""`manifest.json`: what a prepared data folder holds, and where every document and token went."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tidar_common.config import config_hash
from tidar_common.errors import UserError
from tidar_common.files import read_text_checked, write_text_atomic

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
TOKEN_COUNTS = "token_counts.npy"
SHARD_INDEX = "shard_index.npy"
CONTAMINATED = "contaminated.jsonl"
"""Documents that were removed for holding an eval's text; only where they were looked for."""
STATS_PAGE = "stats.html"
"""Bars of what the folder holds, where somebody asked for them; no part of the data."""
CHECKSUM = "checksum"
SPLITS = ("train", "heldout")
MAX_BYTES = 512 << 20
"""Of a manifest: some two million shards."""
SHARD_NAME = re.compile(r"(train|heldout)/[A-Za-z0-9_-][A-Za-z0-9_.-]*\.tar")
FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class ShardInfo:
    """One tar file."""

    name: str
    """Path relative to the data folder, for example `train/000000.tar`."""
    sequences: int
    tokens: int
    """Without padding."""
    padding: int
    """Tokens of padding."""
    bytes: int
    sha256: str


@dataclass(frozen=True)
class TokenizerInfo:
    """The tokenizer that made the shards."""

    kind: str
    """`sentencepiece` or `huggingface`."""
    file: str
    """Name inside the data folder."""
    sha256: str
    vocab_size: int
    mask_id: int
    bos_id: int
    eos_id: int
    pad_id: int
    """Never equal to an id that text can have; a last document that starts with it is padding."""


@dataclass(frozen=True)
class Split:
    """The shards of `train` or `heldout`, and their totals."""

    shards: tuple[ShardInfo, ...]
    documents: int
    text_bytes: int
    """UTF-8 bytes of the documents' text."""
    sequences: int
    tokens: int
    """End-of-document tokens included, padding not."""
    padding: int
    cut_documents: int
    """Documents in more than one piece: those longer than a sequence, unless concatenated."""
    cuts: int
    """Places where they were cut."""
    cut_though_fitting: int = 0
    """Of the cut documents, those no longer than a sequence; only concatenation has any."""

    @property
    def padding_share(self) -> float:
        """Of all positions; 0 where there are none."""
        return self.padding / max(self.padding + self.tokens, 1)


@dataclass(frozen=True)
class Manifest:
    """A prepared data folder."""

    format_version: int
    config: dict[str, Any]
    """The resolved config, of it the keys that decide the output: not where and how fast."""
    config_hash: str
    """SHA-256 of `config`."""
    sequence_length: int
    group_size: int
    """Packed sequences in one sample of a shard; the last of a shard may have fewer."""
    block_size: int
    coverage: float
    shift: bool
    tokenizer: TokenizerInfo
    token_counts_sha256: str
    train: Split
    heldout: Split
    documents: dict[str, Any]
    """Documents read, packed, refused by reason, and filtered by rule."""
    shard_index_sha256: str = ""
    sources: dict[str, dict[str, float]] = field(default_factory=dict)
    """Of each corpus in a mix, by name: documents, text_bytes and tokens in both splits, and
    epochs, how often it was read."""
    loss_span: str = "document"
    """What carries a loss, as the shards are laid out: `document`, or `response` without prompts,
    whose lengths then stand in the shards."""
    encoder: str = ""
    """How text was encoded, and on how much of it that was compared with the plain way."""

    corpus: dict[str, Any] = field(default_factory=dict)
    """Number, bytes, and a hash of the names and sizes of the files it was prepared from."""
    filters: dict[str, Any] = field(default_factory=dict)
    """Where documents were filtered: datatrove's version, the evals looked for, and the hash of
    the list of what held them."""

    @property
    def splits(self) -> dict[str, Split]:
        return {"train": self.train, "heldout": self.heldout}

    @classmethod
    def load(cls, data_dir: Path) -> "Manifest":
        """Read `data_dir/manifest.json`.

        Raises:
            UserError: naming the file when it is missing, damaged, edited, or of another format
                version.
        """
        path = Path(data_dir) / MANIFEST
        if not path.is_file():
            raise UserError(
                f"{path}: not found; prepare the data with tidar-prepare, or finish an "
                "interrupted preparation by running it again"
            )
        try:
            values = json.loads(read_text_checked(path, MAX_BYTES))
            version = values.get("format_version")
            if version != FORMAT_VERSION:
                raise UserError(
                    f"{path}: format version {version}, this release reads {FORMAT_VERSION}; "
                    "prepare the data again"
                )
            if values.pop(CHECKSUM, None) != config_hash(values):
                raise ValueError(f"it does not match its own {CHECKSUM}")
            values["tokenizer"] = TokenizerInfo(**values["tokenizer"])
            for split in SPLITS:
                shards = tuple(ShardInfo(**shard) for shard in values[split]["shards"])
                values[split] = Split(**{**values[split], "shards": shards})
            manifest = cls(**values)
            manifest.check_names()
            return manifest
        except UserError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path}: damaged ({error}); prepare the data again") from error

    def check_names(self) -> None:
        """Raise ValueError for a name that would lead out of the data folder."""
        names = [shard.name for split in self.splits.values() for shard in split.shards]
        odd = [name for name in names if not SHARD_NAME.fullmatch(name)]
        if not FILE_NAME.fullmatch(self.tokenizer.file):
            odd.append(self.tokenizer.file)
        if odd:
            raise ValueError(f"{odd[0]!r} is no name of a file in it")

    def save(self, data_dir: Path) -> None:
        """Write `data_dir/manifest.json`, with a checksum over its values as the last entry."""
        values = asdict(self)
        values[CHECKSUM] = config_hash(values)
        # ASCII only: ids and paths may hold what plain UTF-8 refuses.
        write_text_atomic(data_dir / MANIFEST, json.dumps(values, indent=1) + "\n")

    def fingerprint(self) -> str:
        """Identity of the data: SHA-256 over the hashes of the tokenizer and of every shard."""
        digest = hashlib.sha256(self.tokenizer.sha256.encode())
        for split in self.splits.values():
            for shard in split.shards:
                digest.update(f"\n{shard.name} {shard.sha256}".encode())
        return digest.hexdigest()

    def groups(self, shard: ShardInfo) -> int:
        """Samples in a shard."""
        return -(-shard.sequences // self.group_size)

    def shard_index(self, data_dir: Path) -> list[NDArray[np.int64]]:
        """Of every shard, those of train first: the bytes at which its groups start, and behind
        them where the last one ends; int64 [groups + 1]. Read from disk as far as it is used."""
        path = Path(data_dir) / SHARD_INDEX
        numbers = _load_array(path, mmap_mode="r")
        shards = [shard for split in self.splits.values() for shard in split.shards]
        ends = np.cumsum([self.groups(shard) + 1 for shard in shards])
        if numbers.shape != (int(ends[-1]),):
            raise UserError(f"{path}: does not fit the shards; prepare the data again")
        return np.split(numbers, ends[:-1])

    def token_counts(self, data_dir: Path) -> NDArray[np.int64]:
        """How often each id stands in the train split, padding left out; int64 [vocab_size]."""
        path = data_dir / TOKEN_COUNTS
        counts = _load_array(path)
        if counts.shape != (self.tokenizer.vocab_size,):
            raise UserError(f"{path}: does not fit the tokenizer; prepare the data again")
        return counts


def _load_array(path: Path, mmap_mode: Literal["r"] | None = None) -> NDArray[np.int64]:
    try:
        return np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: missing or damaged; prepare the data again") from error
