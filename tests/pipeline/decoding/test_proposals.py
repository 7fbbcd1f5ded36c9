"""Drafts from elsewhere: verified, they leave the output what AR decoding gives."""

import pytest
import torch
from decoding_models import VOCABULARY, make_model, random_prompts
from test_sampling_exact import expected_pairs, p_value

from pipeline.decoding import DecodeOptions, Sampling, generate, generate_batch
from pipeline.decoding.proposals import DraftModel, PromptLookup
from tidar_common.errors import UserError


def test_lookup_proposes_what_followed_the_longest_known_tail():
    lookup = PromptLookup(count=3)
    text = [5, 1, 2, 9, 1, 2, 7, 8, 6, 1, 2]
    assert lookup.propose(text) == ([7, 8, 6], None)
    assert lookup.propose([5, 1, 2, 9, 3, 2, 7, 1, 2]) == ([9, 3, 2], None)  # two before one
    assert lookup.propose([4, 4]) == ([4], None)
    assert lookup.propose([1, 2, 3]) == ([], None)
    assert lookup.propose([1]) == ([], None)


@pytest.mark.parametrize("method", ["prompt_lookup", "speculative"])
@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_greedy_output_is_that_of_ar(method, penalty):
    model, small = make_model(1, vocabulary=40), make_model(2, vocabulary=40, num_layers=1)
    prompts = random_prompts(1, (1, 4, 12, 25), 40)
    sampling = Sampling(repetition_penalty=penalty)
    expected = generate_batch(
        model, prompts, DecodeOptions(method="ar", max_new_tokens=30, sampling=sampling)
    )
    for block_size in (2, 5):
        got = generate_batch(
            model,
            prompts,
            DecodeOptions(
                method=method,
                block_size=block_size,
                max_new_tokens=30,
                sampling=sampling,
                draft_model=small,
                prefill_chunk=6,
            ),
        )
        assert [run.tokens for run in got] == [run.tokens for run in expected]


def test_a_model_that_drafts_for_itself_is_always_right():
    model = make_model(1, vocabulary=40)
    for temperature in (0.0, 1.0):
        run = generate(
            model, [3, 1], method="speculative", draft_model=model, block_size=4,
            max_new_tokens=21, temperature=temperature,
        )  # fmt: skip
        assert run.accepted == [4] * 5


@pytest.mark.parametrize("vocabulary", [12, 40])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_model_may_have_fewer_or_more_embeddings(vocabulary, temperature):
    """Padding, or a mask token that only one of them has: what only one knows is not drafted."""
    model, small = make_model(1), make_model(1, vocabulary=vocabulary, mask_token_id=None)
    options = {"max_new_tokens": 30, "temperature": temperature, "repetition_penalty": 1.2}
    run = generate(model, [3, VOCABULARY - 1], method="speculative", draft_model=small, **options)
    assert max(run.drafts) == 7
    assert len(run.tokens) == 30
    if temperature == 0:
        ar = generate(model, [3, VOCABULARY - 1], method="ar", **options)
        assert run.tokens == ar.tokens
    drafter = DraftModel(small, Sampling(temperature=temperature), 3, 40, VOCABULARY)
    tokens, rows = drafter.propose([3, 1])
    assert max(tokens) < min(vocabulary, VOCABULARY)
    if rows is not None:
        assert rows.shape == (3, VOCABULARY)
        torch.testing.assert_close(rows.sum(1), torch.ones(3))


def test_repetition_is_found_by_lookup():
    model = make_model(scale=1.0, tie_embeddings=False)
    with torch.no_grad():
        model.model.norm.weight.zero_()  # always token 0
    run = generate(model, [5, 0, 0], method="prompt_lookup", block_size=3, max_new_tokens=20)
    assert run.tokens == [0] * 20
    assert max(run.accepted) == 3 or run.forwards < 15


@pytest.mark.parametrize("method", ["prompt_lookup", "speculative"])
def test_sampled_output_has_the_distribution_of_ar(method):
    model, small = make_model(seed=3, scale=3.0), make_model(seed=4, scale=3.0, num_layers=1)
    sampling = Sampling(temperature=1.0, top_k=9)
    pairs = torch.zeros(VOCABULARY, VOCABULARY)
    runs = generate_batch(
        model,
        [[1, 7, 2]] * 700,
        DecodeOptions(
            method=method, block_size=3, max_new_tokens=3, sampling=sampling, draft_model=small
        ),
    )
    for run in runs:
        pairs[run.tokens[1], run.tokens[2]] += 1
    assert p_value(pairs, expected_pairs(model, sampling)) > 1e-3


def test_what_cannot_be_used_is_named():
    model = make_model()
    for options, message in (
        ({"method": "speculative"}, "draft_model: method=speculative needs a smaller model"),
        ({"method": "prompt_lookup", "block_size": 1}, "block_size: prompt_lookup needs at least"),
        ({"method": "prompt_lookup", "trust": 0.5}, "trust: below 1 needs method=tidar"),
    ):
        with pytest.raises(UserError, match=message):
            generate(model, [1], **options)
    with pytest.raises(UserError, match="decodes one prompt at a time"):
        generate_batch(model, [[1], [2]], DecodeOptions(batch_size=2, method="prompt_lookup"))
