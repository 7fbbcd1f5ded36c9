"""The steps of `tidar-prepare` around its main loop: the tokenizer, the manifest, the summary."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.corpora import Corpus, Document
from data_prep.errors import UserError
from data_prep.files import sha256_of, written_atomically
from data_prep.manifest import (
    FORMAT_VERSION,
    TOKEN_COUNTS,
    Manifest,
    Split,
    TokenizerInfo,
)
from data_prep.settings import PrepareSettings
from data_prep.tokenizers import (
    HUGGINGFACE_FILE,
    SENTENCEPIECE_FILE,
    Tokenizer,
    load_tokenizer,
    train_sentencepiece,
)

TOKENIZER_FILES = {"sentencepiece": SENTENCEPIECE_FILE, "huggingface": HUGGINGFACE_FILE}


def make_tokenizer(settings: PrepareSettings, corpus: Corpus) -> Tokenizer:
    """The tokenizer that the settings name, trained on the training split where they ask for it."""
    config = settings.tokenizer
    if config.path is None:
        print(f"training a SentencePiece model with {config.vocab_size} pieces ...", flush=True)
        texts = (document.text for document in _training_documents(settings, corpus))
        return train_sentencepiece(
            texts, config.vocab_size, config.model_type, config.sample_bytes, settings.seed
        )
    path = Path(config.path).expanduser()
    if not path.exists():
        raise UserError(f"tokenizer.path: {path} does not exist; give a tokenizer file or folder")
    if path.is_dir():
        path = path / TOKENIZER_FILES[config.kind]
    tokenizer = load_tokenizer(path, config.eos_token)
    if tokenizer.kind != config.kind:
        raise UserError(f"tokenizer.path: {path} is not for tokenizer={config.kind}")
    return tokenizer


def _training_documents(settings: PrepareSettings, corpus: Corpus) -> Iterator[Document]:
    return (d for d in corpus.documents() if settings.split_of(d.id) == "train")


def save_token_counts(counts: NDArray[np.int64], folder: Path) -> None:
    """Write how often each id stands in the train split; evals compare with this unigram."""
    with written_atomically(folder / TOKEN_COUNTS) as file:
        np.save(file, counts, allow_pickle=False)


def make_manifest(
    settings: PrepareSettings, corpus: Corpus, splits: dict[str, Split], tokenizer: TokenizerInfo
) -> Manifest:
    """The manifest of a finished preparation.

    Raises:
        UserError: when a split came out empty.
    """
    packed = sum(split.documents for split in splits.values())
    refused = dict(sorted(corpus.refused.items()))
    if packed == 0:
        reasons = ", ".join(f"{count} {reason}" for reason, count in refused.items())
        raise UserError(f"corpus: holds no text ({reasons or 'no documents'}); give another")
    for name, split in splits.items():
        if split.documents == 0:
            change = "raise" if name == "heldout" else "lower"
            raise UserError(
                f"heldout_fraction: none of {packed} documents fell into the {name} split with "
                f"{settings.heldout_fraction}; {change} it, or use more documents"
            )
    return Manifest(
        format_version=FORMAT_VERSION,
        config=settings.decisive,
        config_hash=settings.config_hash,
        sequence_length=settings.sequence_length,
        group_size=settings.group_size,
        block_size=settings.layout.block_size,
        coverage=settings.layout.coverage,
        shift=settings.layout.shift,
        tokenizer=tokenizer,
        token_counts_sha256=sha256_of(settings.output_dir / TOKEN_COUNTS),
        train=splits["train"],
        heldout=splits["heldout"],
        documents={
            "read": packed + sum(refused.values()),
            "packed": packed,
            "refused": refused,
        },
    )


def summary(manifest: Manifest, folder: Path, seconds: float) -> str:
    """What was prepared, a line for each split."""
    lines = []
    for name, split in manifest.splits.items():
        padding = split.padding / (split.padding + split.tokens)
        lines.append(
            f"{name}: {split.documents:,} documents, {split.text_bytes / 1e6:.2f} MB, "
            f"{split.tokens:,} tokens in {split.sequences:,} sequences and {len(split.shards)} "
            f"shards, {padding:.2%} padding, {split.cut_documents:,} documents cut"
        )
    for reason, count in manifest.documents["refused"].items():
        lines.append(f"refused: {count:,} documents, {reason}")
    return "\n".join([*lines, f"{folder} prepared in {seconds:.1f} s"])
