"""A prepared folder of many short documents, in the tokenizer of `small_models`."""

import json
import random
import sys
from pathlib import Path

import pytest
from small_models import TEXT, sentencepiece_tokenizer

from data_prep.prepare import prepare
from tidar_common.cli import run

DOCUMENTS = 400


def prepare_here(*overrides: str) -> int:
    """`tidar-prepare` in this process; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tidar-prepare", *overrides])
        return run("prepare", prepare)


def prepare_documents(folder: Path, *overrides: str) -> Path:
    """Documents of 1 to 150 words in sequences of 48 tokens, several shards; some are cut."""
    rng = random.Random(0)
    words = [word for text in TEXT for word in text.split()]
    corpus = folder / "text.jsonl"
    texts = [
        "".join(rng.choice(words) + rng.choice(" \n") for _ in range(int(rng.expovariate(0.1)) + 1))
        for _ in range(DOCUMENTS)
    ]
    corpus.write_text("".join(json.dumps({"text": text + " ❤"}) + "\n" for text in texts))
    sentencepiece_tokenizer().save(folder)
    code = prepare_here(
        "corpus=jsonl", f"corpus.path={corpus}", f"tokenizer.path={folder}", "sequence_length=48",
        "layout.block_size=4", "heldout_fraction=0.2", "shard_sequences=40", "group_size=8",
        f"output_dir={folder / 'data'}", *overrides,
    )  # fmt: skip
    assert code == 0
    return folder / "data"
