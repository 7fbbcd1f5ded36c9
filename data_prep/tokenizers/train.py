"""A SentencePiece model trained on a sample of a corpus, the same for the same text and seed."""

import io
import random
import re
from collections.abc import Iterable, Iterator

import sentencepiece

from data_prep.tokenizers.load import MASK_PIECE, SentencePieceTokenizer
from tidar_common.errors import UserError

CHUNK_BYTES = 2000
"""Length of the pieces of text that SentencePiece trains on, to a line more or less."""
LONGEST_LINE = 1000
"""Characters after which a longer line is cut for training: in UTF-8 at most 4,000 bytes."""
LONGEST_SENTENCE_BYTES = CHUNK_BYTES + 4 * LONGEST_LINE
"""What SentencePiece must take; it drops longer sentences in silence, from 4,192 by default."""


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int, model_type: str, sample_bytes: int, seed: int
) -> SentencePieceTokenizer:
    """Train on a sample of about `sample_bytes` of `texts`, drawn by `seed` over all of them.

    Text is cut into runs of whole lines, so that pieces may hold line ends and indentation.

    Raises:
        UserError: when the sample is empty, or too small for that many pieces.
    """
    sample = sample_chunks(texts, sample_bytes, seed)
    if not sample:
        raise UserError("corpus: has no text to train a tokenizer on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            control_symbols=[MASK_PIECE],
            max_sentence_length=LONGEST_SENTENCE_BYTES,
            num_threads=1,  # more change the result of unigram training
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        most = re.search(r"value <= (\d+)", str(error))
        least = re.search(r"required_chars\. \d+ vs (\d+)", str(error))
        remedy = f"use at most {most[1]}" if most else "use a smaller number"
        if least:
            raise UserError(
                f"tokenizer.vocab_size: {vocab_size} is smaller than the number of different "
                f"characters of this text; use at least {least[1]}"
            ) from error
        raise UserError(
            f"tokenizer.vocab_size: {vocab_size} pieces cannot be had from this text; {remedy}, "
            "or more text"
        ) from error
    tokenizer = SentencePieceTokenizer(model.getvalue(), "the trained tokenizer")
    if tokenizer.vocab_size < vocab_size:
        raise UserError(
            f"tokenizer.vocab_size: {vocab_size} asked, but this text gave only "
            f"{tokenizer.vocab_size} pieces; use that number or more text"
        )
    return tokenizer


def sample_chunks(texts: Iterable[str], sample_bytes: int, seed: int) -> list[str]:
    """Chunks of whole lines of about `CHUNK_BYTES`, a uniform sample of `sample_bytes` of them.

    Reservoir sampling: one pass, memory for the sample only, the same result for the same input.
    """
    keep = max(sample_bytes // CHUNK_BYTES, 1)
    rng = random.Random(seed)
    reservoir: list[str] = []
    for count, chunk in enumerate(_chunks(texts)):
        if len(reservoir) < keep:
            reservoir.append(chunk)
        elif (slot := rng.randrange(count + 1)) < keep:
            reservoir[slot] = chunk
    return reservoir


def _chunks(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        chunk, size = [], 0
        for line in text.replace("\0", "").splitlines(keepends=True):
            for start in range(0, len(line), LONGEST_LINE):
                part = line[start : start + LONGEST_LINE]
                chunk.append(part)
                size += len(part.encode())
                if size >= CHUNK_BYTES:
                    yield "".join(chunk)
                    chunk, size = [], 0
        if chunk:
            yield "".join(chunk)
