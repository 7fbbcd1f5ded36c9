"""`tidar-prepare`: raw text to packed, laid-out, sharded sequences, in stages (`write_data`)."""

import errno
import sys
import time
from collections import Counter
from pathlib import Path

from omegaconf import DictConfig

from data_prep.config import PrepareSettings
from data_prep.corpora import open_corpus
from data_prep.formats.manifest import Manifest
from data_prep.inspect.show import describe, inspect_sequence, read_contents, write_page
from data_prep.inspect.verify import verify_data
from data_prep.stages.merge import finished_records, merge
from data_prep.stages.output_folder import (
    clear_finished,
    is_prepared,
    locked_folder,
    taking_turns,
)
from data_prep.stages.plan import make_plan, save_tokenizer, tasks_of_this_job
from data_prep.stages.screen import screen
from data_prep.stages.task import run_task
from data_prep.stages.workers import Workers
from tidar_common.cli import run
from tidar_common.errors import UserError
from tidar_common.progress import Progress
from tidar_common.run_files import Exit

DISK_TROUBLES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EIO)


def prepare(cfg: DictConfig) -> int:
    settings = PrepareSettings.from_config(cfg)
    folder = settings.output_dir
    if settings.verify:
        print(verify_data(folder))
        return 0
    if settings.stats:
        print_stats(folder)
        return 0
    if settings.inspect is not None:
        print(inspect_sequence(folder, settings.inspect))
        return 0
    try:
        with (
            Workers(settings.workers) as workers,
            locked_folder(folder, shared=settings.array is not None),
        ):
            if is_prepared(settings):
                print(f"{folder} is prepared with these settings already; "
                      "overwrite=true prepares it anew")  # fmt: skip
                print(corpus_change(folder, cfg.corpus, settings.heldout_path), end="", flush=True)
                return 0
            started = time.perf_counter()
            manifest = write_data(settings, cfg.corpus, workers)
            if manifest is not None:
                print(summary(manifest, folder, time.perf_counter() - started))
            return 0
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return Exit.INTERRUPTED
    except OSError as error:
        if error.errno not in DISK_TROUBLES:
            raise
        raise UserError(
            f"output_dir: {folder} cannot be written ({error.strerror}); make room, or choose "
            "another folder, and run the same command again to continue"
        ) from error


def write_data(
    settings: PrepareSettings, corpus_section: DictConfig, workers: Workers
) -> Manifest | None:
    """Do the tasks of this process; where all are done then, put the folder together.

    Returns:
        Manifest | None: of the finished folder; None where other jobs of an array still work.
    """
    corpus = open_corpus(corpus_section, settings.heldout_path)
    settings = settings.for_corpus(corpus.total_bytes)
    # Plan: the tokenizer, and the corpus in tasks.
    with taking_turns(settings.output_dir):
        preparation, tasks = make_plan(settings, corpus)
        tasks_here = tasks_of_this_job(settings, tasks)
        # Only now: a mistake in the corpus or the tokenizer must not cost the data that is there.
        clear_finished(settings.output_dir)
        save_tokenizer(preparation)
    # Screen: which documents are left out, by rules, evals and copies.
    if not screen(preparation, tasks, tasks_here, workers):
        return None
    # Read, encode, pack, write: each task by itself, so that what is done is never done again.
    records = finished_records(settings, tasks)
    if done := sum(record is not None for record in records):
        print(f"{done} of {len(tasks)} tasks are done already", flush=True)
    unfinished = [task for task in tasks_here if records[task.number] is None]
    workers.run(run_task, unfinished, preparation, Progress().add)
    # Merge: rests and held-out documents are packed, and the manifest written.
    return merge(preparation, tasks)


def corpus_change(folder: Path, corpus_section: DictConfig, heldout_path: str | None) -> str:
    """A line about files that the corpus of a finished folder has lost, got or changed; or none."""
    was = Manifest.load(folder).corpus
    try:
        now = open_corpus(corpus_section, heldout_path).described()
    except UserError as error:
        return f"its corpus cannot be compared with what it was made from: {error}\n"
    if not was or was == now:
        return ""
    sizes = [f"{corpus['files']:,} files and {corpus['bytes']:,} bytes" for corpus in (was, now)]
    return f"its corpus is no longer what it was made from: {sizes[0]} then, {sizes[1]} now\n"


def print_stats(folder: Path) -> None:
    """Say what a prepared folder holds, and draw it into the folder."""
    contents = read_contents(folder)
    print(describe(contents), flush=True)
    try:
        print(write_page(contents))
    except OSError as error:
        raise UserError(
            f"output_dir: {folder} cannot take the page of bars ({error.strerror}); make it "
            "writable, or use a copy"
        ) from error


def summary(manifest: Manifest, folder: Path, seconds: float) -> str:
    """What was prepared, a line for each split."""
    lines = []
    for name, split in manifest.splits.items():
        lines.append(
            f"{name}: {split.documents:,} documents, {split.text_bytes / 1e6:.2f} MB, "
            f"{split.tokens:,} tokens in {split.sequences:,} sequences and {len(split.shards)} "
            f"shards, {split.padding_share:.2%} padding, {split.cut_documents:,} documents cut"
        )
    total = sum(split.tokens for split in manifest.splits.values())
    for name, source in manifest.sources.items():
        lines.append(
            f"{name}: {source['documents']:,} documents, {source['tokens']:,} tokens, "
            f"{source['tokens'] / total:.1%} of all, "
            f"read {source['epochs']:.2f} times"
        )
    for reason, count in manifest.documents["refused"].items():
        lines.append(f"refused: {count:,} documents, {reason}")
    for rule, count in Counter(manifest.documents.get("filtered", {})).most_common():
        lines.append(f"filtered: {count:,} documents, {rule}")
    return "\n".join([*lines, f"{folder} prepared in {seconds:.1f} s"])


def main() -> None:
    sys.exit(run("prepare", prepare))


if __name__ == "__main__":
    main()
