"""`tidar-prepare`: raw text to packed, laid-out, sharded sequences."""

import errno
import sys
import time
from pathlib import Path

from omegaconf import DictConfig

from data_prep.corpora import Corpus, open_corpus
from data_prep.filters.screening import find_copies, is_screened, screen_task
from data_prep.formats.manifest import MANIFEST, Manifest
from data_prep.inspect.picture import inspect_sequence
from data_prep.inspect.stats import describe, read_contents, write_page
from data_prep.inspect.verify import verify_data
from data_prep.layout import RESPONSE
from data_prep.preparing import choose_encoder, make_tokenizer, note_trained, summary
from data_prep.settings import PrepareSettings
from data_prep.stages.merge import finished_records, merge
from data_prep.stages.output_folder import (
    clear_finished,
    is_prepared,
    locked_folder,
    remove_leftovers,
    taking_turns,
)
from data_prep.stages.plan import Task, make_tasks, own_tasks
from data_prep.stages.task import run_task
from data_prep.stages.workers import Workers
from data_prep.tokenizers.load import Tokenizer
from tidar_common.cli import run
from tidar_common.errors import UserError
from tidar_common.progress import Progress

EXIT_INTERRUPTED = 130
"""As a shell gives it for Ctrl-C."""
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
                return 0
            started = time.perf_counter()
            manifest = write_data(settings, cfg.corpus, workers)
            if manifest is not None:
                print(summary(manifest, folder, time.perf_counter() - started))
            return 0
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return EXIT_INTERRUPTED
    except OSError as error:
        if error.errno not in DISK_TROUBLES:
            raise
        raise UserError(
            f"output_dir: {folder} cannot be written ({error.strerror}); make room, or choose "
            "another folder, and run the same command again to continue"
        ) from error


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


def write_data(
    settings: PrepareSettings, corpus_section: DictConfig, workers: Workers
) -> Manifest | None:
    """Do the tasks of this process; where all are done then, put the folder together."""
    folder = settings.output_dir
    corpus = open_corpus(corpus_section)
    if settings.layout.loss_span == RESPONSE and not corpus.has_prompts:
        raise UserError(
            "layout.loss_span: response needs a corpus that tells prompts apart; set "
            "corpus.prompt_field (jsonl, parquet, arrow), or layout.loss_span=document"
        )
    with taking_turns(folder):
        tokenizer = make_tokenizer(settings, corpus)
        tasks = make_tasks(settings, corpus, tokenizer)
        own = own_tasks(settings, tasks)
        choose_encoder(tokenizer, corpus, tasks)
        # Only now: a mistake in the corpus or the tokenizer must not cost the data that is there.
        clear_finished(folder)
        tokenizer_path = tokenizer.save(folder)
        note_trained(settings, corpus, tokenizer_path)
    if not screened(settings, tasks, own, corpus, tokenizer, tokenizer_path, workers):
        return None
    records = finished_records(settings, tasks)
    if done := sum(record is not None for record in records):
        print(f"{done} of {len(tasks)} tasks are done already", flush=True)
    unfinished = [task for task in own if records[task.number] is None]
    work = (settings, corpus, tokenizer, tokenizer_path, Progress().add)
    workers.run(run_task, unfinished, *work)
    return put_together(settings, tasks, tokenizer, tokenizer_path)


def screened(
    settings: PrepareSettings, tasks: list[Task], own: list[Task], corpus: Corpus,
    tokenizer: Tokenizer, tokenizer_path: Path, workers: Workers,
) -> bool:  # fmt: skip
    """Decide which documents to leave out; whether that is known now of all tasks."""
    if not settings.screens:
        return True
    unscreened = [task for task in own if not is_screened(settings, task)]
    if unscreened:
        print(f"screening {len(unscreened)} of {len(own)} tasks ...", flush=True)
    work = (settings, corpus, tokenizer, tokenizer_path, Progress().add)
    workers.run(screen_task, unscreened, *work)
    done = sum(is_screened(settings, task) for task in tasks)
    if done < len(tasks):
        print(
            f"{done} of {len(tasks)} tasks are screened; when all are, start the same jobs once "
            "more to pack them"
        )
        return False
    with taking_turns(settings.output_dir):
        find_copies(settings, tasks)
    return True


def put_together(
    settings: PrepareSettings, tasks: list[Task], tokenizer: Tokenizer, tokenizer_path: Path
) -> Manifest | None:
    """Make one folder of what the tasks left; None where other jobs of an array still work on
    theirs, or one of them did it."""
    folder = settings.output_dir
    with taking_turns(folder):
        if (folder / MANIFEST).exists():
            return None
        missing = finished_records(settings, tasks).count(None)
        if missing:
            print(
                f"{len(tasks) - missing} of {len(tasks)} tasks are done; the job that does the "
                f"last one puts {folder} together"
            )
            return None
        manifest = merge(settings, tasks, tokenizer, tokenizer_path)
        remove_leftovers(manifest, folder)
    return manifest


def main() -> None:
    sys.exit(run("prepare", prepare))


if __name__ == "__main__":
    main()
