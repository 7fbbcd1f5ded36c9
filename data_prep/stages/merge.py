"""Merge: what all tasks left becomes one data folder with one manifest.

Shards get their numbers in the order of the tasks, which is that of the plan, not that in which
they ended. What did not fill a sequence inside its task is packed here with that of all others,
and so is the held-out split.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from data_prep.config import PrepareSettings
from data_prep.formats.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    SHARD_INDEX,
    SPLITS,
    TOKEN_COUNTS,
    Manifest,
    ShardInfo,
    Split,
)
from data_prep.stages.output_folder import TASKS_FOLDER, remove_leftovers, taking_turns
from data_prep.stages.plan import Preparation, Task, epochs_read, plan_key
from data_prep.stages.screen import describe_screening
from data_prep.stages.task import Count, Counts, Record, load_record, load_rests
from data_prep.stages.write import SplitWriter, Written
from tidar_common.errors import UserError
from tidar_common.files import fsync_path, sha256_of, write_text_atomic, written_atomically

MERGING = "merging"
"""In the tasks' folder: the plan whose shards are being moved to their final names."""


def finished_records(settings: PrepareSettings, tasks: Sequence[Task]) -> list[Record | None]:
    """The record of each task, None for those that are not finished."""
    folder = settings.output_dir / TASKS_FOLDER
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


def merge(preparation: Preparation, tasks: Sequence[Task]) -> Manifest | None:
    """Make one folder of what the tasks left; None where other jobs of an array still work on
    theirs, or one of them did it. Raises UserError when a split came out empty."""
    settings = preparation.settings
    folder = settings.output_dir
    with taking_turns(folder):
        if (folder / MANIFEST).exists():
            return None
        records = finished_records(settings, tasks)
        finished = [record for record in records if record is not None]
        if len(finished) < len(tasks):
            print(
                f"{len(finished)} of {len(tasks)} tasks are done; the job that does the last one "
                f"puts {folder} together"
            )
            return None
        manifest = put_together(preparation, tasks, finished)
        manifest.save(folder)
        remove_leftovers(manifest, folder)
    return manifest


def put_together(
    preparation: Preparation, tasks: Sequence[Task], records: Sequence[Record]
) -> Manifest:
    """Pack the rests, give all shards their final names, and describe what the folder holds."""
    settings = preparation.settings
    folder = settings.output_dir / TASKS_FOLDER
    totals = Counts()
    for record in records:
        totals.add(record.counts)
    _check_not_empty(settings, totals)
    writers = {
        name: SplitWriter(settings, name, preparation.tokenizer, len(tasks)) for name in SPLITS
    }
    for task in tasks:
        rests, token_counts = load_rests(folder, task)
        writers["train"].token_counts += token_counts
        for split, pieces in rests.items():
            for piece in pieces:
                writers[split].add(piece)
    written = {
        split: writer.finish(folder, f"{split}-", keep_rests=False)[0]
        for split, writer in writers.items()
    }
    write_text_atomic(folder / MERGING, plan_key(settings, tasks))
    train = [*(record.train for record in records), written["train"]]
    splits, offsets = {}, []
    for split, parts in (("train", train), ("heldout", [written["heldout"]])):
        splits[split] = _moved(settings, split, parts, totals.splits[split])
        offsets += [numbers for part in parts for numbers in part.offsets]
    _save_array(settings.output_dir / TOKEN_COUNTS, writers["train"].token_counts)
    index = np.concatenate([np.array(numbers, dtype=np.int64) for numbers in offsets])
    _save_array(settings.output_dir / SHARD_INDEX, index)
    return make_manifest(preparation, tasks, totals, splits)


def _check_not_empty(settings: PrepareSettings, totals: Counts) -> None:
    packed = sum(count.documents for count in totals.splits.values())
    if packed == 0:
        left_out = totals.refused + totals.filtered
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        what = "no text is left" if totals.filtered else "holds no text"
        raise UserError(f"corpus: {what} ({reasons or 'no documents'}); give another")
    for name, count in totals.splits.items():
        if count.documents == 0 and (name == "train" or settings.holds_out):
            if settings.heldout_path is not None:
                key = "corpus" if name == "train" else "heldout_path"
                raise UserError(f"{key}: none of its documents is left for {name}; give another")
            change = "raise" if name == "heldout" else "lower"
            raise UserError(
                f"heldout_fraction: none of {packed} documents fell into the {name} split with "
                f"{settings.heldout_fraction:g}; {change} it, or use more documents"
            )


def _moved(settings: PrepareSettings, split: str, parts: Sequence[Written], count: Count) -> Split:
    """Give the shards their final names; those that a merge before this one moved stand there."""
    folder = settings.output_dir / split
    folder.mkdir(exist_ok=True)
    shards: list[ShardInfo] = []
    for part in parts:
        for shard in part.shards:
            final = _final(settings, split, len(shards))
            waiting = settings.output_dir / TASKS_FOLDER / shard.name
            if waiting.exists():
                os.replace(waiting, final)
            name = final.relative_to(settings.output_dir).as_posix()
            shards.append(ShardInfo(**{**asdict(shard), "name": name}))
    fsync_path(folder)
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
    preparation: Preparation, tasks: Sequence[Task], totals: Counts, splits: dict[str, Split]
) -> Manifest:
    """The manifest of a finished preparation."""
    settings, tokenizer = preparation.settings, preparation.tokenizer
    packed = sum(split.documents for split in splits.values())
    epochs = epochs_read(tasks)
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
        tokenizer=tokenizer.info(settings.output_dir / tokenizer.file_name),
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
            name: {**asdict(count), "epochs": round(epochs[name], 4)}
            for name, count in sorted(totals.sources.items())
        },
        encoder=preparation.encoder,
        corpus=preparation.corpus.described(),
        filters=describe_screening(settings, tasks),
    )


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
