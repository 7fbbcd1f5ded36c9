"""`tidar-prepare verify=true`: read a prepared folder again and check it against its manifest."""

from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.formats.groups import PackedSequence
from data_prep.formats.manifest import (
    CONTAMINATED,
    MANIFEST,
    SHARD_INDEX,
    TOKEN_COUNTS,
    Manifest,
    ShardInfo,
    Split,
)
from data_prep.formats.shards import group_offsets, read_shard
from data_prep.layout import RESPONSE
from data_prep.tokenizers.load import Tokenizer, load_tokenizer
from tidar_common.errors import UserError
from tidar_common.files import sha256_of

COUNTED_TOGETHER = 256
"""Sequences; a count of the ids takes time in proportion to the vocabulary."""


@dataclass
class _Totals:
    token_counts: NDArray[np.int64]
    """How often each id stands in the split, padding left out."""
    sequences: int = 0
    tokens: int = 0
    padding: int = 0
    shards: set[str] = field(default_factory=set)


def verify_data(folder: Path) -> str:
    """Check every file of `folder`, its hash and its content; returns a line about it.

    Raises:
        UserError: naming the first file that is missing, damaged, or not as the manifest says.
    """
    manifest = Manifest.load(folder)
    _check_documents(folder, manifest)
    tokenizer_path = folder / manifest.tokenizer.file
    _check_hash(tokenizer_path, manifest.tokenizer.sha256)
    _check_hash(folder / TOKEN_COUNTS, manifest.token_counts_sha256)
    _check_hash(folder / SHARD_INDEX, manifest.shard_index_sha256)
    if listed := manifest.filters.get("contaminated_sha256"):
        _check_hash(folder / CONTAMINATED, listed)
    tokenizer = load_tokenizer(tokenizer_path)
    if tokenizer.info(tokenizer_path) != manifest.tokenizer:
        raise UserError(
            f"{tokenizer_path}: its ids differ from {MANIFEST}; prepare again with overwrite=true"
        )
    for name, split in manifest.splits.items():
        totals = _verify_split(folder, manifest, name, split, tokenizer)
        if name == "train":
            stored = manifest.token_counts(folder)
            if not np.array_equal(stored, totals.token_counts):
                raise UserError(f"{folder / TOKEN_COUNTS}: not the counts of the train split")
    _check_index(folder, manifest)
    shards = sum(len(split.shards) for split in manifest.splits.values())
    sequences = sum(split.sequences for split in manifest.splits.values())
    return f"{folder}: {shards} shards with {sequences:,} sequences are as the manifest says"


def _check_documents(folder: Path, manifest: Manifest) -> None:
    """No document may be lost between what was read and what was packed or refused."""
    documents = manifest.documents
    packed = sum(split.documents for split in manifest.splits.values())
    left_out = sum(documents["refused"].values()) + sum(documents.get("filtered", {}).values())
    if (packed, packed + left_out) != (
        documents["packed"],
        documents["read"],
    ):
        raise UserError(f"{folder / MANIFEST}: its counts of documents do not add up")


def _check_index(folder: Path, manifest: Manifest) -> None:
    """Every group has to stand where the index says."""
    index = iter(manifest.shard_index(folder))
    for split in manifest.splits.values():
        for shard in split.shards:
            if next(index).tolist() != group_offsets(folder / shard.name):
                raise UserError(f"{folder / SHARD_INDEX}: does not fit {shard.name}")


def _verify_split(
    folder: Path, manifest: Manifest, name: str, split: Split, tokenizer: Tokenizer
) -> _Totals:
    totals = _Totals(np.zeros(tokenizer.vocab_size, dtype=np.int64))
    for shard in split.shards:
        _verify_shard(folder, manifest, shard, totals)
    present = {f"{name}/{path.name}" for path in (folder / name).glob("*.tar")}
    if unlisted := sorted(present - totals.shards):
        raise UserError(f"{folder / unlisted[0]}: is not in {MANIFEST}; remove it")
    counted = (totals.sequences, totals.tokens, totals.padding)
    if counted != (split.sequences, split.tokens, split.padding):
        raise UserError(
            f"{folder / MANIFEST}: says (sequences, tokens, padding) of {name} are "
            f"{(split.sequences, split.tokens, split.padding)}, the shards hold {counted}"
        )
    return totals


def _verify_shard(folder: Path, manifest: Manifest, shard: ShardInfo, totals: _Totals) -> None:
    path = folder / shard.name
    _check_hash(path, shard.sha256)
    sequences, padding = 0, 0
    counts = np.zeros_like(totals.token_counts)
    rest = read_shard(path)
    while group := list(islice(rest, COUNTED_TOGETHER)):
        real = [_check_sequence(path, sequence, manifest) for sequence in group]
        ids = [sequence.tokens[:length] for sequence, length in zip(group, real, strict=True)]
        counts += np.bincount(np.concatenate(ids), minlength=len(counts))
        sequences += len(group)
        padding += sum(len(sequence.tokens) for sequence in group) - sum(real)
    totals.token_counts += counts
    tokens = sequences * manifest.sequence_length - padding
    if (sequences, tokens, padding) != (shard.sequences, shard.tokens, shard.padding):
        raise UserError(
            f"{path}: holds other counts than {MANIFEST} says; prepare again with overwrite=true"
        )
    totals.shards.add(shard.name)
    totals.sequences += sequences
    totals.tokens += tokens
    totals.padding += padding


def _check_sequence(path: Path, sequence: PackedSequence, manifest: Manifest) -> int:
    """Check one sequence against the data contract; returns its tokens without padding."""
    tokens, lengths = sequence.tokens, sequence.document_lengths
    ids = manifest.tokenizer
    if len(tokens) != manifest.sequence_length or int(tokens.max()) >= ids.vocab_size:
        raise UserError(f"{path}: a sequence has a wrong length or an id outside the vocabulary")
    real = sequence.real_tokens(ids.pad_id)
    text = tokens[:real]
    if ((text == ids.pad_id) | (text == ids.mask_id)).any():
        raise UserError(f"{path}: a document holds the padding or the mask token")
    if (tokens[real:] != ids.pad_id).any():
        raise UserError(f"{path}: the padding holds other tokens than padding")
    if sequence.continued is None or len(sequence.continued) != len(lengths):
        raise UserError(f"{path}: not every document says whether it goes on from a cut")
    layout = sequence.layout
    prompts = np.zeros_like(lengths)
    if (sequence.prompt_lengths is not None) != (manifest.loss_span == RESPONSE):
        raise UserError(f"{path}: {MANIFEST} says something else of prompts than it has")
    if sequence.prompt_lengths is not None:
        prompts = sequence.prompt_lengths
    learnt = real - int(prompts.sum())
    longest = max(manifest.coverage * learnt, manifest.block_size)
    ends = np.cumsum(lengths)
    document = np.searchsorted(ends[:-1], layout.prefix_end, side="right")
    starts = (ends - lengths)[document]
    fits = (
        np.array_equal(layout.prefix_start, starts)
        and bool((layout.prefix_end >= starts + prompts[document]).all())
        and bool((layout.draft_end <= np.minimum(ends[document], real)).all())
        and bool((layout.draft_lengths <= manifest.block_size).all())
        and bool((layout.draft_end[:-1] <= layout.prefix_end[1:]).all())
        and min(learnt, 1) <= layout.num_slots <= longest
        and (manifest.coverage < 1.0 or layout.num_slots == learnt)
    )
    if not fits:
        raise UserError(
            f"{path}: a layout table does not fit its documents; prepare again with overwrite=true"
        )
    return real


def _check_hash(path: Path, expected: str) -> None:
    if not path.is_file():
        raise UserError(f"{path}: is missing; prepare the data again with overwrite=true")
    if sha256_of(path) != expected:
        raise UserError(
            f"{path}: differs from what {MANIFEST} says; prepare again with overwrite=true"
        )
