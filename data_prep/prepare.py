"""`tidar-prepare`: raw text to packed, laid-out, sharded sequences."""

import sys
import time

from omegaconf import DictConfig

from data_prep.cli import run
from data_prep.corpora import open_corpus
from data_prep.encoding import encode_documents
from data_prep.manifest import SPLITS
from data_prep.preparing import (
    make_manifest,
    make_tokenizer,
    open_output_dir,
    remove_leftovers,
    save_token_counts,
    summary,
)
from data_prep.progress import Progress
from data_prep.settings import PrepareSettings
from data_prep.split_writer import SplitWriter
from data_prep.verify import verify_data


def prepare(cfg: DictConfig) -> int:
    settings = PrepareSettings.from_config(cfg)
    folder = settings.output_dir
    if settings.verify:
        print(verify_data(folder))
        return 0
    if open_output_dir(settings):
        print(f"{folder} is prepared with these settings already; overwrite=true prepares it anew")
        return 0
    started = time.perf_counter()
    corpus = open_corpus(cfg.corpus)
    tokenizer = make_tokenizer(settings, corpus)
    tokenizer_path = tokenizer.save(folder)
    writers = {split: SplitWriter(settings, split, tokenizer) for split in SPLITS}
    progress = Progress()
    documents = corpus.documents()
    for document in encode_documents(documents, tokenizer, tokenizer_path, settings.workers):
        writers[settings.split_of(document.id)].add(document)
        progress.add(document.text_bytes, len(document.ids))
    splits = {name: writer.finish() for name, writer in writers.items()}
    save_token_counts(writers["train"].token_counts, folder)
    manifest = make_manifest(settings, corpus, splits, tokenizer.info(tokenizer_path))
    remove_leftovers(manifest, folder)
    manifest.save(folder)
    print(summary(manifest, folder, time.perf_counter() - started))
    return 0


def main() -> None:
    sys.exit(run("prepare", prepare))


if __name__ == "__main__":
    main()
