"""SentencePiece: every text comes back as it was, and no text gives a control symbol."""

import pickle
import random
import sys

import numpy as np
import pytest
import sentencepiece

from data_prep.tokenizers.load import SentencePieceTokenizer, load_tokenizer
from data_prep.tokenizers.train import (
    LONGEST_LINE,
    LONGEST_SENTENCE_BYTES,
    sample_chunks,
    train_sentencepiece,
)
from tidar_common.errors import UserError

SPELLED_OUT = "<mask><pad><s></s><unk> <0x41> <|mask|> <|endoftext|>"
TEXTS = {
    "ascii": "def f(x):\n\treturn x  # two  spaces   and more\n",
    "leading and trailing spaces": "  a \n\n b  ",
    "only spaces": "     ",
    "carriage returns": "a\r\nb\rc\n\n",
    "cjk": "机器学习、日本語の文字列、한국어 문장",
    "emoji": "🙂👩‍👩‍👧‍👦🏳️‍🌈 é é ﬁ ½ Å",
    "right to left": "שלום עולם مرحبا بالعالم",
    "control characters": "".join(map(chr, range(32))) + "\x7f\x80\x85\u2028\u2029\ufeff",
    "NUL": "a\0b\0\0",
    "the space sign": "\u2581 \u2581\u2581a\u2581 b",
    "spelled-out symbols": SPELLED_OUT,
    "the last code point": chr(sys.maxunicode) + "\uffff\ud7ff\ue000",
    "a very long line": "abc 机 \u2581" * 20_000,
}


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def model(request, tokenizer, texts) -> SentencePieceTokenizer:
    if request.param == "unigram":
        return tokenizer
    return train_sentencepiece(texts, 500, "bpe", 60_000, seed=0)


@pytest.mark.parametrize("name", TEXTS)
def test_text_comes_back_as_it_was(model, name):
    assert model.decode(model.encode(TEXTS[name])) == TEXTS[name]


def test_random_unicode_comes_back_as_it_was(model):
    rng = random.Random(0)
    points = [p for p in range(sys.maxunicode + 1) if not 0xD800 <= p < 0xE000]
    for _ in range(200):
        text = "".join(map(chr, rng.choices(points, k=rng.randrange(1, 50))))
        assert model.decode(model.encode(text)) == text


def test_no_text_gives_a_control_symbol(model):
    control = {model.mask_id, model.bos_id, model.eos_id, model.pad_id}
    assert len(control) == 4
    for text in TEXTS.values():
        assert not control & set(model.encode(text))
    unknown = model._model.unk_id()
    assert unknown not in model.encode(TEXTS["emoji"] + TEXTS["cjk"])


def test_control_symbols_decode_to_nothing(model):
    ids = model.encode("one two")
    framed = [model.bos_id, *ids, model.mask_id, model.eos_id, model.pad_id]
    assert model.decode(framed) == "one two"


def test_a_batch_gives_what_single_texts_give(model):
    assert model.encoders == ("plain",)
    batch = model.encode_batch(list(TEXTS.values()))
    for ids, text in zip(batch, TEXTS.values(), strict=True):
        assert ids.dtype == np.int32
        assert ids.tolist() == model.encode(text)


def test_saved_and_loaded_it_is_the_same(model, tmp_path):
    path = model.save(tmp_path)
    copied = pickle.loads(pickle.dumps(model))  # as it travels to a worker
    for again in (load_tokenizer(path), load_tokenizer(tmp_path), copied):
        assert again.info(path) == model.info(path)
        assert again.encode(TEXTS["cjk"]) == model.encode(TEXTS["cjk"])


def test_training_is_deterministic(texts, tokenizer):
    again = train_sentencepiece(texts, 600, "unigram", 100_000, seed=0)
    assert again.content() == tokenizer.content()


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_too_little_text_names_the_number_that_can_be_had(model_type):
    with pytest.raises(UserError, match=r"^tokenizer\.vocab_size: 4096 .*(\d+)") as caught:
        train_sentencepiece(["a short text, and no more\n"] * 3, 4096, model_type, 10_000, 0)
    assert "\n" not in str(caught.value)


def test_no_text_is_an_error():
    with pytest.raises(UserError, match="no text to train a tokenizer on"):
        train_sentencepiece([], 400, "unigram", 10_000, 0)


def test_one_long_line_is_enough_to_train_on():
    """SentencePiece drops sentences over 4,192 bytes in silence: lines are cut before."""
    rng = random.Random(0)
    line = " ".join("".join(rng.choices("abcdefgh", k=rng.randint(2, 6))) for _ in range(9000))
    assert train_sentencepiece([line], 320, "bpe", 50_000, 0).vocab_size == 320


def test_a_sample_is_whole_chunks_from_everywhere():
    texts = [f"{number:04d} " + "x" * 2100 + "\n" for number in range(500)]
    sample = sample_chunks(texts, 100_000, seed=1)
    assert len(sample) == 50
    assert set(sample) <= {part for text in texts for part in sample_chunks([text], 10_000, 0)}
    assert sample != sample_chunks(texts, 100_000, seed=2)
    assert max(sample) > texts[300], "late texts are drawn too"
    wide = sample_chunks([chr(sys.maxunicode) * 5 * LONGEST_LINE], 10**6, 0)
    assert max(len(chunk.encode()) for chunk in wide) <= LONGEST_SENTENCE_BYTES
    assert "".join(sample_chunks(["a\nb\0\nc"], 10**6, 0)) == "a\nb\nc"


def test_a_model_without_a_mask_symbol_is_refused(tmp_path, texts):
    prefix = tmp_path / "plain"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts[:20]), model_prefix=str(prefix), vocab_size=400,
        byte_fallback=True, model_type="bpe", minloglevel=2,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"plain\.model: has no .*control symbol <mask>"):
        load_tokenizer(prefix.with_suffix(".model"))


def test_a_model_that_adds_spaces_keeps_its_own_reading_of_the_space_sign(tmp_path, texts):
    prefix = tmp_path / "spaced"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts[:20]), model_prefix=str(prefix), vocab_size=400,
        byte_fallback=True, model_type="bpe", control_symbols=["<mask>"], minloglevel=2,
    )  # fmt: skip
    spaced = load_tokenizer(prefix.with_suffix(".model"))
    text = "a\u2581b"
    assert spaced.encode(text) == spaced._model.encode(text)
    assert spaced.pad_id == spaced.mask_id, "without a padding symbol the mask stands in"


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("tokenizer.model", b"not a model", "not a SentencePiece model"),
        ("tokenizer.json", b"{}", r"not a Hugging Face tokenizer\.json"),
        ("nothing.model", None, "cannot be read"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, name, content, text):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=text) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match=r"holds neither tokenizer\.model nor tokenizer\.json"):
        load_tokenizer(tmp_path)
