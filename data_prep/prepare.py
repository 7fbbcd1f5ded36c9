"""`tidar-prepare`: raw text to packed, laid-out, sharded sequences."""

import errno
import sys
import time
from contextlib import closing

from omegaconf import DictConfig

from data_prep.cli import run
from data_prep.corpora import open_corpus
from data_prep.encoding import encode_documents
from data_prep.errors import UserError
from data_prep.manifest import SPLITS, Manifest
from data_prep.output_folder import clear_finished, is_prepared, locked_folder, remove_leftovers
from data_prep.preparing import make_manifest, make_tokenizer, save_token_counts, summary
from data_prep.progress import Progress
from data_prep.settings import PrepareSettings
from data_prep.split_writer import SplitWriter
from data_prep.verify import verify_data

EXIT_INTERRUPTED = 130
"""As a shell gives it for Ctrl-C."""
DISK_TROUBLES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EIO)


def prepare(cfg: DictConfig) -> int:
    settings = PrepareSettings.from_config(cfg)
    folder = settings.output_dir
    if settings.verify:
        print(verify_data(folder))
        return 0
    try:
        with locked_folder(folder):
            if is_prepared(settings):
                print(f"{folder} is prepared with these settings already; "
                      "overwrite=true prepares it anew")  # fmt: skip
                return 0
            started = time.perf_counter()
            manifest = write_data(settings, cfg.corpus)
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


def write_data(settings: PrepareSettings, corpus_section: DictConfig) -> Manifest:
    """Fill the output folder; its manifest comes last."""
    folder = settings.output_dir
    corpus = open_corpus(corpus_section)
    tokenizer = make_tokenizer(settings, corpus)
    # Only now: a mistake in the corpus or the tokenizer must not cost the data that is there.
    clear_finished(folder)
    tokenizer_path = tokenizer.save(folder)
    writers = {split: SplitWriter(settings, split, tokenizer) for split in SPLITS}
    progress = Progress()
    documents = corpus.documents()
    encoded = encode_documents(documents, tokenizer, tokenizer_path, settings.workers)
    with closing(encoded):
        for document in encoded:
            writers[settings.split_of(document.id)].add(document)
            progress.add(document.text_bytes, len(document.ids))
    splits = {name: writer.finish() for name, writer in writers.items()}
    save_token_counts(writers["train"].token_counts, folder)
    manifest = make_manifest(settings, corpus, splits, tokenizer.info(tokenizer_path))
    remove_leftovers(manifest, folder)
    manifest.save(folder)
    return manifest


def main() -> None:
    sys.exit(run("prepare", prepare))


if __name__ == "__main__":
    main()
