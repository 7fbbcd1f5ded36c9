"""Fast ways of encoding: the first that gives the ids of the plain one is chosen."""

import numpy as np
import pytest

from data_prep.stages.plan import fastest_encoder
from data_prep.tokenizers.load import SentencePieceTokenizer
from data_prep.tokenizers.train import train_sentencepiece
from tidar_common.errors import UserError


class ThreeWays(SentencePieceTokenizer):
    """One of which gives a wrong id more for each text with an `x`."""

    encoders = ("wrong", "right", "plain")

    def encode_batch(self, texts, encoder="plain"):
        ids = super().encode_batch(texts)
        if encoder == "wrong":
            return [
                np.append(row, 5) if "x" in text else row
                for row, text in zip(ids, texts, strict=True)
            ]
        return ids


@pytest.fixture(scope="module")
def bpe(mixed) -> SentencePieceTokenizer:
    return train_sentencepiece(mixed[:20], 1000, "bpe", 200_000, seed=0)


def test_a_batch_gives_what_single_texts_give_on_a_megabyte_of_everything(bpe, mixed):
    for ids, text in zip(bpe.encode_batch(mixed), mixed, strict=True):
        assert ids.tolist() == bpe.encode(text)


def test_too_few_pieces_for_the_characters_is_named(mixed):
    with pytest.raises(UserError, match=r"vocab_size: 1000 is smaller .* use at least \d{4}"):
        train_sentencepiece(mixed[:60], 1000, "bpe", 400_000, seed=0)


@pytest.mark.parametrize(("text", "chosen"), [("box", "right"), ("bow", "wrong")])
def test_the_first_that_gives_the_same_is_chosen(bpe, corpus_of, tmp_path, capsys, text, chosen):
    corpus, tasks = corpus_of(tmp_path, [text, "a", "b"])
    assert fastest_encoder(bpe, corpus, tasks) == "plain"
    assert fastest_encoder(ThreeWays(bpe.content(), "three"), corpus, tasks) == chosen
    refusal = "encoder wrong: other ids on 1 of 3 documents, so it is not used\n"
    assert capsys.readouterr().out == (refusal if chosen == "right" else "")
