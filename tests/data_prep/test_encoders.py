"""Fast ways of encoding: identical on a megabyte of everything, and refused where they are not."""

import sys
import unicodedata

import numpy as np
import pytest
from omegaconf import OmegaConf

from data_prep.corpora import open_corpus
from data_prep.corpora.python_stdlib import StdlibConfig, StdlibCorpus
from data_prep.errors import UserError
from data_prep.plan import Task
from data_prep.preparing import choose_encoder
from data_prep.tokenizers import SentencePieceTokenizer, train_sentencepiece

CODE_BYTES = 700_000


@pytest.fixture(scope="module")
def mixed() -> list[str]:
    """Code, many scripts, emoji, every code point that is one, and what a broken decoder leaves."""
    code = [d.text for d in StdlibCorpus(StdlibConfig(max_bytes=CODE_BYTES)).documents()]
    points = [
        chr(n)
        for n in range(1, sys.maxunicode + 1)
        if unicodedata.category(chr(n)) not in ("Cs", "Cn", "Co")
    ]
    scripts = ["".join(points[start : start + 997]) for start in range(0, len(points), 997)]
    broken = [
        bytes(np.random.default_rng(n).integers(0, 256, 500, dtype=np.uint8)).decode(
            errors="replace"
        )
        for n in range(20)
    ]
    ends = [
        "\r\n\r\n a\n\n\n\tb\n",
        "\n",
        "\n\n\n",
        "a\x0bb\x0cc\u2028d\x85e",
        "🙂\n👩\u200d👩\u200d👧 \n",
    ]
    texts = [*code, *scripts, *broken, *ends]
    assert sum(len(text.encode()) for text in texts) > 1_000_000
    return texts


@pytest.fixture(scope="module")
def bpe(mixed) -> SentencePieceTokenizer:
    return train_sentencepiece(mixed[:20], 1000, "bpe", 200_000, seed=0)


def test_lines_give_the_ids_of_the_whole_text(bpe, mixed):
    """A text is divided only where no piece of the model reaches across, and it is divided."""
    assert bpe.encoders[0] == "lines"
    assert len(bpe._boundary.split(mixed[0])) > 50
    pieces = [bpe._model.id_to_piece(i) for i in range(bpe.vocab_size)]
    assert any("\n" in piece and len(piece) > 1 for piece in pieces)
    bpe.encoder = "lines"
    for ids, text in zip(bpe.encode_batch(mixed), mixed, strict=True):
        assert ids.tolist() == bpe.encode(text)


def test_too_few_pieces_for_the_characters_is_named(mixed):
    with pytest.raises(UserError, match=r"vocab_size: 1000 is smaller .* use at least \d{4}"):
        train_sentencepiece(mixed[:60], 1000, "bpe", 400_000, seed=0)


def corpus_of(tmp_path, texts):
    for number, text in enumerate(texts):
        (tmp_path / f"{number:03d}.txt").write_text(text, newline="")
    section = {"kind": "text_folder", "path": str(tmp_path)}
    corpus = open_corpus(OmegaConf.create(section))
    return corpus, [Task(0, tuple(corpus.parts()), "")]


def test_the_first_that_gives_the_same_is_chosen(bpe, tmp_path, mixed, monkeypatch, capsys):
    corpus, tasks = corpus_of(tmp_path, mixed[:5])
    choose_encoder(bpe, corpus, tasks)
    assert bpe.encoder == "lines"
    assert capsys.readouterr().out == ""

    def wrong(texts):
        return [np.append(ids, 5).astype(np.int32) for ids in map(bpe.encode, texts)]

    monkeypatch.setattr(bpe, "_encode_lines", wrong)
    choose_encoder(bpe, corpus, tasks)
    assert bpe.encoder == "batch"
    said = capsys.readouterr().out
    assert said == "encoder lines: other ids on 5 of 5 documents, so it is not used\n"
