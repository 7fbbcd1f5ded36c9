"""Likelihood of the held-out split against loops over documents, blocks and tokens."""

import math
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from evals_data import BLOCK_SIZE, OneRank, make_flat_model, make_model, model_config

from pipeline.evals.config import LikelihoodConfig
from pipeline.evals.heldout import documents
from pipeline.evals.likelihood import evaluate_likelihood, sum_up

WHOLE = LikelihoodConfig()


def evaluate(data, model, config=WHOLE) -> dict:
    return evaluate_likelihood(model, data.tokenizer, data.heldout, config, OneRank())


@pytest.fixture(scope="module")
def model(data):
    return make_model(model_config(data.tokenizer), scale=3.0)


@pytest.fixture(scope="module")
def result(data, model) -> dict:
    return evaluate(data, model)


def assert_near(got, expected) -> None:
    """Equal, but for the rounding of sums in another order."""
    if isinstance(expected, dict):
        assert list(got) == list(expected)
        for key, value in expected.items():
            assert_near(got[key], value)
    elif isinstance(expected, list):
        assert len(got) == len(expected)
        for one, value in zip(got, expected, strict=True):
            assert_near(one, value)
    else:
        assert got == (pytest.approx(expected) if isinstance(expected, float) else expected)


def all_documents(data) -> list[list[int]]:
    """The documents of the held-out shards, long ones in pieces."""
    sequences = data.heldout.sequences(None, 0, BLOCK_SIZE, shift=False)
    return [document.tolist() for sequence in sequences for document in documents(sequence)]


def losses(logits: torch.Tensor, targets: list[int]) -> list[float]:
    log_probabilities = torch.log_softmax(logits.double(), -1)
    return [-float(row[token]) for row, token in zip(log_probabilities, targets, strict=True)]


@torch.no_grad()
def test_losses_are_those_of_loops(data, model, result):
    ar, by_place = [], [[] for _ in range(BLOCK_SIZE)]
    mask_id = data.tokenizer.mask_id
    for document in all_documents(data):
        ar += losses(model(torch.tensor([document]))[0, :-1], document[1:])
        for start in range(0, len(document), BLOCK_SIZE):
            block = document[start : start + BLOCK_SIZE]
            total = start + len(block)
            mask = torch.ones(total, total, dtype=torch.bool).tril()
            mask[start:] = True
            ids = torch.tensor([document[:start] + [mask_id] * len(block)])
            for place, loss in enumerate(losses(model(ids, mask=mask)[0, start:], block)):
                by_place[place].append(loss)
    assert result["ar_tokens"] == len(ar)
    assert result["ar_loss"] == pytest.approx(np.mean(ar), rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(np.mean(ar)), rel=1e-4)
    assert result["diffusion_tokens"] == sum(map(len, by_place)) == data.manifest.heldout.tokens
    assert result["diffusion_loss"] == pytest.approx(np.mean(list(chain(*by_place))), rel=1e-5)
    bits = sum(chain(*by_place)) / math.log(2) / result["text_bytes"]
    assert result["diffusion_bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert result["diffusion_perplexity"] == pytest.approx(math.exp(result["diffusion_loss"]))
    expected = [np.mean(place) for place in by_place]
    assert result["diffusion_loss_by_place"] == pytest.approx(expected, rel=1e-5)


def test_every_sequence_is_scored_once(data, result):
    split = data.manifest.heldout
    assert result["whole_split"] is True
    assert result["sequences"] == split.sequences
    assert result["documents"] == len(all_documents(data)) == split.documents + split.cuts
    assert result["ar_tokens"] == split.tokens - result["documents"]
    assert result["text_bytes"] == sum(len(text.encode()) for text in data.texts["heldout"])
    assert result["unigram_entropy"] == data.heldout.unigram().entropy


def test_bits_per_byte_of_a_unigram_model_is_that_of_its_code(data):
    """A model that ignores its input must cost what coding every token by frequency costs."""
    model = make_model(model_config(data.tokenizer, tie_embeddings=False))
    probabilities = torch.from_numpy(data.heldout.unigram().probabilities)
    model.lm_head = torch.nn.Linear(model.config.hidden_size, len(probabilities))
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.copy_(probabilities.log())
    result = evaluate(data, model)
    assert result["ar_loss"] == pytest.approx(result["unigram_loss"], rel=1e-5)
    ids = [token for document in all_documents(data) for token in document]
    bits = -float(probabilities[torch.tensor(ids)].log2().sum())
    assert result["bits_per_byte"] == pytest.approx(bits / result["text_bytes"], rel=1e-5)
    assert result["diffusion_loss"] == pytest.approx(bits * math.log(2) / len(ids), rel=1e-5)


def test_a_part_of_the_split_counts_its_own_bytes(data, model):
    result = evaluate(data, model, replace(WHOLE, sequences=3))
    assert result["whole_split"] is False
    assert result["sequences"] == 3
    chosen = list(data.heldout.sequences(3, 0, BLOCK_SIZE, shift=False))
    texts = [data.tokenizer.decode(d.tolist()) for s in chosen for d in documents(s)]
    assert result["text_bytes"] == sum(len(text.encode()) for text in texts)
    assert result["text_bytes"] < data.manifest.heldout.text_bytes
    known = set(data.texts["heldout"])
    assert sum(text in known for text in texts) > len(texts) / 2


def test_counting_bytes_by_decoding_agrees_with_the_manifest(data, model):
    """But for cuts that go through a character, of which this text has few."""
    sequences = data.heldout.sequences(None, 0, BLOCK_SIZE, shift=False)
    controls = data.heldout.controls(OneRank(), drafts=False)
    sums = sum_up(model, data.tokenizer, sequences, BLOCK_SIZE, controls)
    assert sums.text_bytes == pytest.approx(data.manifest.heldout.text_bytes, rel=0.01)


def test_a_flat_model_has_the_loss_of_a_flat_distribution(data):
    result = evaluate(data, make_flat_model(model_config(data.tokenizer)))
    expected = math.log(data.tokenizer.vocab_size)
    assert result["ar_loss"] == pytest.approx(expected, rel=1e-5)
    assert result["diffusion_loss_by_place"] == pytest.approx([expected] * BLOCK_SIZE, rel=1e-5)


def test_a_twin_has_no_diffusion_loss(data, model, result):
    twin = make_model(model_config(data.tokenizer).without_drafting(), scale=3.0)
    alone = evaluate(data, twin)
    assert alone["ar_loss"] == pytest.approx(result["ar_loss"], rel=1e-5)
    assert alone["bits_per_byte"] == pytest.approx(result["bits_per_byte"], rel=1e-5)
    for name in ("block_size", "diffusion_loss", "diffusion_loss_by_place"):
        assert alone[name] is None
    assert alone["diffusion_tokens"] == 0


def test_two_ranks_say_what_one_says(data, two_ranks):
    model = make_model(model_config(data.tokenizer))
    for config, got in zip(
        (WHOLE, replace(WHOLE, sequences=1)), two_ranks["likelihood"], strict=True
    ):
        expected = evaluate(data, model, config)
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            assert_near(got[key], value)


@pytest.mark.parametrize("name", ["sequences", "block_size"])
def test_bad_settings_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        LikelihoodConfig(**{name: 0})
