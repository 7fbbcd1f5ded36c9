"""The data folder that tests of evals share."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from evals_data import evaluate_on_ranks, texts, write_data, write_tasks
from workers import run_workers

from data_prep.corpora import Document
from data_prep.formats.manifest import Manifest
from data_prep.tokenizers.load import load_tokenizer
from pipeline.evals.heldout import HeldOut


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> SimpleNamespace:
    """folder, manifest, tokenizer, heldout; texts: by split, the text of each document."""
    settings = write_data(tmp_path_factory.mktemp("prepared"))
    folder: Path = settings.output_dir
    manifest = Manifest.load(folder)
    by_split: dict[str, list[str]] = {"train": [], "heldout": []}
    for name, text in texts().items():
        by_split[settings.split_of(Document(name, text))].append(text)
    return SimpleNamespace(
        folder=folder,
        manifest=manifest,
        tokenizer=load_tokenizer(folder),
        heldout=HeldOut(folder, manifest),
        texts=by_split,
    )


@pytest.fixture(scope="session")
def tasks_dir(tmp_path_factory) -> Path:
    """Task definitions for lm-eval; its copies of their data go to a temporary folder, too."""
    folder = tmp_path_factory.mktemp("tasks")
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
    return write_tasks(folder)


@pytest.fixture(scope="session")
def two_ranks(data, tasks_dir, tmp_path_factory) -> dict:
    """What two gloo ranks say: they must agree on everything, clock times included."""
    folder = tmp_path_factory.mktemp("ranks")
    first, second = run_workers(evaluate_on_ranks, 2, folder, str(data.folder), str(tasks_dir))
    assert first == second
    return first
