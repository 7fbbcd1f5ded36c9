"""The steps of `tidar-prepare` around its main loop: where it writes, and with what tokenizer."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.corpora import Corpus, Document
from data_prep.errors import UserError
from data_prep.files import sha256_of, written_atomically
from data_prep.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    SPLITS,
    TOKEN_COUNTS,
    Manifest,
    Split,
    TokenizerInfo,
)
from data_prep.settings import PrepareSettings
from data_prep.split_writer import DONE_FOLDER
from data_prep.tokenizers import (
    HUGGINGFACE_CONFIG,
    HUGGINGFACE_FILE,
    SENTENCEPIECE_FILE,
    Tokenizer,
    load_tokenizer,
    train_sentencepiece,
)

OWN_NAMES = {
    *SPLITS, DONE_FOLDER, MANIFEST, TOKEN_COUNTS,
    SENTENCEPIECE_FILE, HUGGINGFACE_FILE, HUGGINGFACE_CONFIG,
}  # fmt: skip
"""Everything that a prepared folder, finished or not, may hold."""
TOKENIZER_FILES = {"sentencepiece": SENTENCEPIECE_FILE, "huggingface": HUGGINGFACE_FILE}


def open_output_dir(settings: PrepareSettings) -> bool:
    """Make the output folder ready; returns whether it is prepared with these settings already.

    Raises:
        UserError: when it cannot be written, holds something else, or was prepared with other
            settings and `overwrite` is off.
    """
    folder = settings.output_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise UserError(f"output_dir: {folder} cannot be written ({error.strerror})") from error
    foreign = sorted(name for name in found - OWN_NAMES if not name.endswith(".writing"))
    if foreign:
        raise UserError(
            f"output_dir: {folder} holds {foreign[0]}, which no preparation writes; choose an "
            "empty or a new folder"
        )
    if MANIFEST not in found:
        return False
    if not settings.overwrite:
        manifest = Manifest.load(folder)
        if manifest.config_hash == settings.config_hash:
            _require_shards(manifest, folder)
            return True
        raise UserError(
            f"output_dir: {folder} was prepared with other settings; choose another folder, or "
            "overwrite=true to replace it"
        )
    # The manifest goes first: what is half removed must not look finished.
    (folder / MANIFEST).unlink()
    for name in found - {MANIFEST}:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return False


def _require_shards(manifest: Manifest, folder: Path) -> None:
    """A quick look at every shard; `verify=true` reads them."""
    for split in manifest.splits.values():
        for shard in split.shards:
            path = folder / shard.name
            if not path.is_file() or path.stat().st_size != shard.bytes:
                raise UserError(f"{path}: missing or damaged; prepare again with overwrite=true")


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
    for name, split in splits.items():
        if split.documents == 0:
            change = "raise" if name == "heldout" else "lower"
            raise UserError(
                f"heldout_fraction: none of {packed} documents fell into the {name} split with "
                f"{settings.heldout_fraction}; {change} it, or use more documents"
            )
    refused = dict(sorted(corpus.refused.items()))
    return Manifest(
        format_version=FORMAT_VERSION,
        config=settings.resolved,
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


def remove_leftovers(manifest: Manifest, folder: Path) -> None:
    """Delete what an earlier, interrupted preparation left and this one does not list."""
    shutil.rmtree(folder / DONE_FOLDER, ignore_errors=True)
    for split, listed in manifest.splits.items():
        names = {shard.name for shard in listed.shards}
        for path in (folder / split).glob("*"):
            if f"{split}/{path.name}" not in names:
                path.unlink()
