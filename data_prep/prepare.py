"""`tidar-prepare`: raw text to packed, laid-out, sharded sequences."""

import json
import shutil
import sys
import time

import numpy as np
from omegaconf import DictConfig

from data_prep.cli import run
from data_prep.corpora import Corpus, open_corpus
from data_prep.encoding import encode_documents
from data_prep.errors import UserError
from data_prep.files import write_text_atomic, written_atomically
from data_prep.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    SPLITS,
    TOKEN_COUNTS,
    Manifest,
    Split,
)
from data_prep.preparing import check_output_dir, make_tokenizer, summary
from data_prep.settings import PrepareSettings
from data_prep.split_writer import DONE_FOLDER, SplitWriter
from data_prep.verify import verify_data


def prepare(cfg: DictConfig) -> int:
    settings = PrepareSettings.from_config(cfg)
    if settings.verify:
        print(verify_data(settings.output_dir))
        return 0
    if check_output_dir(settings):
        print(f"{settings.output_dir} is already prepared with these settings; overwrite=true redoes it")
        return 0
    started = time.perf_counter()
    corpus = open_corpus(cfg.corpus)
    tokenizer = make_tokenizer(settings, corpus)
    path = tokenizer.save(settings.output_dir)
    writers = {
        split: SplitWriter(
            settings, split, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id
        )
        for split in SPLITS
    }
    for document in encode_documents(corpus.documents(), tokenizer, path, settings.workers):
        writers[settings.split_of(document.id)].add(document.ids, document.text_bytes)
    splits = {split: writer.finish() for split, writer in writers.items()}
    manifest = make_manifest(settings, corpus, splits, writers, tokenizer.info(path))
    manifest.save(settings.output_dir)
    shutil.rmtree(settings.output_dir / DONE_FOLDER, ignore_errors=True)
    print(summary(settings, manifest, time.perf_counter() - started))
    return 0
