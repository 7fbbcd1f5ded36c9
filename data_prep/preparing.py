"""The steps of `tidar-prepare` around its tasks: the tokenizer, its encoder, the summary."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.corpora import Corpus, Document
from data_prep.formats.manifest import Manifest
from data_prep.settings import PrepareSettings
from data_prep.stages.plan import Task
from data_prep.stages.task import FOLDER
from data_prep.tokenizers.load import (
    HUGGINGFACE_FILE,
    SENTENCEPIECE_FILE,
    Tokenizer,
    load_tokenizer,
)
from data_prep.tokenizers.train import train_sentencepiece
from tidar_common.config import config_hash
from tidar_common.errors import UserError
from tidar_common.files import sha256_of, write_text_atomic

TOKENIZER_FILES = {"sentencepiece": SENTENCEPIECE_FILE, "huggingface": HUGGINGFACE_FILE}
TRAINED = "tokenizer.json"
"""In the tasks' folder: from what text the tokenizer beside it was trained."""
COMPARED_BYTES, COMPARED_SHARE = 1_000_000, 200
"""Text on which a fast encoder has to give what the plain one gives; of a corpus that is small half
a hundredth, or comparing would take longer than what it saves."""


def make_tokenizer(settings: PrepareSettings, corpus: Corpus) -> Tokenizer:
    """The tokenizer that the settings name, trained on the training split where they ask for it.

    One that an interrupted preparation trained on the same text is taken as it is.
    """
    config = settings.tokenizer
    if config.path is None:
        return _trained(settings, corpus)
    path = Path(config.path).expanduser()
    if not path.exists():
        raise UserError(f"tokenizer.path: {path} does not exist; give a tokenizer file or folder")
    if path.is_dir():
        path = path / TOKENIZER_FILES[config.kind]
    tokenizer = load_tokenizer(path, config.eos_token)
    if tokenizer.kind != config.kind:
        raise UserError(f"tokenizer.path: {path} is not for tokenizer={config.kind}")
    return tokenizer


def _trained(settings: PrepareSettings, corpus: Corpus) -> Tokenizer:
    path = settings.output_dir / SENTENCEPIECE_FILE
    note = settings.output_dir / FOLDER / TRAINED
    try:
        known = {"from": _text_key(settings, corpus), "sha256": sha256_of(path)}
        if json.loads(note.read_text()) == known:
            return load_tokenizer(path)
    except (OSError, ValueError):
        pass  # nothing of an earlier start that can be used
    config = settings.tokenizer
    print(f"training a SentencePiece model with {config.vocab_size} pieces ...", flush=True)
    texts = (document.whole for document in _training_documents(settings, corpus))
    return train_sentencepiece(
        texts, config.vocab_size, config.model_type, config.sample_bytes, settings.seed
    )


def note_trained(settings: PrepareSettings, corpus: Corpus, tokenizer_path: Path) -> None:
    """Record what the saved tokenizer was trained on, so that a rerun need not train it again."""
    if settings.tokenizer.path is None:
        note = {"from": _text_key(settings, corpus), "sha256": sha256_of(tokenizer_path)}
        write_text_atomic(settings.output_dir / FOLDER / TRAINED, json.dumps(note))


def _text_key(settings: PrepareSettings, corpus: Corpus) -> str:
    """Identity of the text and the config that a tokenizer is trained with."""
    stamps = [part.stamp for part in corpus.parts() if part.epoch == 0]
    return config_hash([settings.config_hash, stamps])


def _training_documents(settings: PrepareSettings, corpus: Corpus) -> Iterator[Document]:
    return (d for d in corpus.documents() if settings.split_of(d.id) == "train")


def choose_encoder(tokenizer: Tokenizer, corpus: Corpus, tasks: Sequence[Task]) -> None:
    """Set the tokenizer to its fastest encoder that gives the ids of the plain one on up to a
    megabyte of this corpus, from all over it; prints a line about one that does not."""
    texts, size = [], 0
    enough = min(COMPARED_BYTES, max(corpus.total_bytes // COMPARED_SHARE, COMPARED_BYTES // 10))
    for task in tasks:
        # Parts are in an order drawn by the seed: the first few stand for all.
        for document in corpus.documents(task.parts):
            texts.append(document.whole)
            size += len(document.whole.encode())
            if size >= enough:
                break
        if size >= enough:
            break
    expected = [tokenizer.encode(text) for text in texts]
    for encoder in tokenizer.encoders:
        tokenizer.encoder = encoder
        got = [ids.tolist() for ids in tokenizer.encode_batch(texts)]
        differing = sum(own != other for own, other in zip(got, expected, strict=True))
        if differing == 0:
            break
        print(
            f"encoder {encoder}: other ids on {differing} of {len(texts)} documents, so it is not "
            "used",
            flush=True,
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
    total = sum(split.tokens for split in manifest.splits.values())
    for name, own in manifest.sources.items():
        lines.append(
            f"{name}: {own['documents']:,} documents, {own['tokens']:,} tokens, "
            f"{own['tokens'] / total:.1%} of all, "
            f"read {own['epochs']:.2f} times"
        )
    for reason, count in manifest.documents["refused"].items():
        lines.append(f"refused: {count:,} documents, {reason}")
    for rule, count in Counter(manifest.documents.get("filtered", {})).most_common():
        lines.append(f"filtered: {count:,} documents, {rule}")
    return "\n".join([*lines, f"{folder} prepared in {seconds:.1f} s"])
