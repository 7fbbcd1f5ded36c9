"""All tasks done: what they left becomes one data folder with one manifest.

Shards get their numbers in the order of the tasks, which is that of the plan, not that in which
they ended. What did not fill a sequence inside its task is packed here with that of all others,
and so is the held-out split.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.filters.identity import datatrove_version
from data_prep.filters.screening import Screen, contaminated_lines
from data_prep.formats.manifest import (
    CONTAMINATED,
    FORMAT_VERSION,
    SHARD_INDEX,
    SPLITS,
    TOKEN_COUNTS,
    Manifest,
    ShardInfo,
    Split,
)
from data_prep.settings import PrepareSettings
from data_prep.stages.plan import Task, epochs_read, plan_key
from data_prep.stages.task import FOLDER, Count, Record, load_record, load_rests
from data_prep.stages.write import SplitWriter, Written
from data_prep.tokenizers.load import Tokenizer
from tidar_common.errors import UserError
from tidar_common.files import fsync_folder, sha256_of, write_text_atomic, written_atomically

MERGING = "merging"
"""In the tasks' folder: the plan whose shards are being moved to their final names."""


@dataclass
class _Totals:
    counts: dict[str, Count] = field(default_factory=lambda: {name: Count() for name in SPLITS})
    sources: dict[str, Count] = field(default_factory=dict)
    refused: Counter[str] = field(default_factory=Counter)
    filtered: Counter[str] = field(default_factory=Counter)
    epochs: dict[str, float] = field(default_factory=dict)


def finished_records(settings: PrepareSettings, tasks: Sequence[Task]) -> list[Record | None]:
    """The record of each task, None for those that are not finished."""
    folder = settings.output_dir / FOLDER
    merging = _is_merging(folder, plan_key(settings, tasks))
    records: list[Record | None] = []
    number = 0
    for task in tasks:
        finals: dict[str, Path] = {}

        def moved(shard: ShardInfo, finals: dict[str, Path] = finals) -> bool:
            final = finals.get(shard.name)
            return final is not None and _has_size(final, shard.bytes)

        if merging:
            first = number
            unchecked = load_record(folder, task, lambda _: True)
            shards = unchecked.train.shards if unchecked else []
            number += len(shards)
            for offset, shard in enumerate(shards):
                finals[shard.name] = _final(settings, "train", first + offset)
        records.append(load_record(folder, task, moved))
    return records


def merge(
    settings: PrepareSettings, tasks: Sequence[Task], tokenizer: Tokenizer, tokenizer_path: Path
) -> Manifest:
    """Put the output folder together; every task must be finished. The manifest comes last.

    Raises:
        UserError: when a split came out empty.
    """
    folder = settings.output_dir / FOLDER
    records = [record for record in finished_records(settings, tasks) if record is not None]
    assert len(records) == len(tasks), "every task is finished"
    totals = _sum(records)
    totals.epochs = epochs_read(tasks)
    _check_not_empty(settings, totals)
    rests = {name: SplitWriter(settings, name, tokenizer, len(tasks)) for name in SPLITS}
    for task in tasks:
        pieces, token_counts = load_rests(folder, task)
        rests["train"].token_counts += token_counts
        for split, own in pieces.items():
            for piece in own:
                rests[split].add(piece)
    written = {
        split: writer.finish(folder, f"{split}-", keep_rests=False)[0]
        for split, writer in rests.items()
    }
    write_text_atomic(folder / MERGING, plan_key(settings, tasks))
    train = [*(record.train for record in records), written["train"]]
    splits, offsets = {}, []
    for split, parts in (("train", train), ("heldout", [written["heldout"]])):
        splits[split] = _moved(settings, split, parts, totals.counts[split])
        offsets += [numbers for part in parts for numbers in part.offsets]
    _save_array(settings.output_dir / TOKEN_COUNTS, rests["train"].token_counts)
    index = np.concatenate([np.array(numbers, dtype=np.int64) for numbers in offsets])
    _save_array(settings.output_dir / SHARD_INDEX, index)
    if settings.decontaminate.any:
        lines = contaminated_lines(settings, tasks)
        write_text_atomic(settings.output_dir / CONTAMINATED, "".join(f"{x}\n" for x in lines))
    manifest = make_manifest(settings, totals, splits, tokenizer, tokenizer_path)
    manifest.save(settings.output_dir)
    return manifest


def _sum(records: Sequence[Record]) -> _Totals:
    totals = _Totals()
    for record in records:
        for name, own in record.counts.items():
            totals.counts[name].add(own)
        for name, own in sorted(record.sources.items()):
            totals.sources.setdefault(name, Count()).add(own)
        totals.refused.update(record.refused)
        totals.filtered.update(record.filtered)
    return totals


def _check_not_empty(settings: PrepareSettings, totals: _Totals) -> None:
    packed = sum(own.documents for own in totals.counts.values())
    if packed == 0:
        left_out = totals.refused + totals.filtered
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        what = "no text is left" if totals.filtered else "holds no text"
        raise UserError(f"corpus: {what} ({reasons or 'no documents'}); give another")
    for name, own in totals.counts.items():
        if own.documents == 0:
            change = "raise" if name == "heldout" else "lower"
            raise UserError(
                f"heldout_fraction: none of {packed} documents fell into the {name} split with "
                f"{settings.heldout_fraction}; {change} it, or use more documents"
            )


def _moved(settings: PrepareSettings, split: str, parts: Sequence[Written], count: Count) -> Split:
    """Give the shards their final names; those that a merge before this one moved stand there."""
    folder = settings.output_dir / split
    folder.mkdir(exist_ok=True)
    shards: list[ShardInfo] = []
    for part in parts:
        for shard in part.shards:
            final = _final(settings, split, len(shards))
            waiting = settings.output_dir / FOLDER / shard.name
            if waiting.exists():
                os.replace(waiting, final)
            name = final.relative_to(settings.output_dir).as_posix()
            shards.append(ShardInfo(**{**asdict(shard), "name": name}))
    fsync_folder(folder)
    return Split(
        shards=tuple(shards),
        documents=count.documents,
        text_bytes=count.text_bytes,
        sequences=sum(shard.sequences for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        padding=sum(shard.padding for shard in shards),
        cut_documents=sum(part.cut_documents for part in parts),
        cuts=sum(part.cuts for part in parts),
        cut_though_fitting=sum(part.cut_though_fitting for part in parts),
    )


def make_manifest(
    settings: PrepareSettings, totals: _Totals, splits: dict[str, Split], tokenizer: Tokenizer,
    tokenizer_path: Path,
) -> Manifest:  # fmt: skip
    """The manifest of a finished preparation."""
    packed = sum(split.documents for split in splits.values())
    return Manifest(
        format_version=FORMAT_VERSION,
        config=settings.decisive,
        config_hash=settings.config_hash,
        sequence_length=settings.sequence_length,
        group_size=settings.group_size,
        block_size=settings.layout.block_size,
        coverage=settings.layout.coverage,
        shift=settings.layout.shift,
        loss_span=settings.layout.loss_span,
        tokenizer=tokenizer.info(tokenizer_path),
        token_counts_sha256=sha256_of(settings.output_dir / TOKEN_COUNTS),
        train=splits["train"],
        heldout=splits["heldout"],
        documents={
            "read": packed + totals.refused.total() + totals.filtered.total(),
            "packed": packed,
            "filtered": dict(sorted(totals.filtered.items())),
            "refused": dict(sorted(totals.refused.items())),
        },
        shard_index_sha256=sha256_of(settings.output_dir / SHARD_INDEX),
        sources={
            name: {**asdict(own), "epochs": round(totals.epochs[name], 4)}
            for name, own in sorted(totals.sources.items())
        },
        encoder=tokenizer.encoder,
        filters=_filters(settings),
    )


def _filters(settings: PrepareSettings) -> dict[str, Any]:
    """What removed documents, beside the config: the manifest's `filters`."""
    if not settings.screens:
        return {}
    found: dict[str, Any] = {"datatrove": datatrove_version()}
    if settings.decontaminate.any:
        found["evals"] = Screen.of(settings).evals.described()
        found["contaminated_sha256"] = sha256_of(settings.output_dir / CONTAMINATED)
    return found


def _is_merging(folder: Path, key: str) -> bool:
    try:
        return (folder / MERGING).read_text() == key
    except OSError:
        return False


def _final(settings: PrepareSettings, split: str, number: int) -> Path:
    return settings.output_dir / split / f"{number:06d}.tar"


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _save_array(path: Path, numbers: np.ndarray) -> None:
    with written_atomically(path) as file:
        np.save(file, numbers, allow_pickle=False)
