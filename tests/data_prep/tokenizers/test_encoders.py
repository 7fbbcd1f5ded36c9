"""Fast ways of encoding: identical on a megabyte of everything, and refused where they are not."""

import numpy as np
import pytest

from data_prep.preparing import choose_encoder
from data_prep.tokenizers.load import SentencePieceTokenizer
from data_prep.tokenizers.train import train_sentencepiece
from tidar_common.errors import UserError


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


def test_the_first_that_gives_the_same_is_chosen(
    bpe, corpus_of, tmp_path, mixed, monkeypatch, capsys
):  # fmt: skip
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
