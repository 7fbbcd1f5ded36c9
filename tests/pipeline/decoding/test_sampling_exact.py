"""Sampled output has the distribution of plain decoding, under every setting; with power checks.

The reference is written with the logit processors of transformers, on full forwards without cache.
"""

import pytest
import torch
from decoding_models import VOCABULARY, make_model
from scipy.stats import chisquare
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from data_prep.errors import UserError
from pipeline.decoding import Sampling, engine, generate, generate_batch
from pipeline.decoding.sampling import Uniforms, draw
from pipeline.decoding.verify import verify, verify_greedy

SETTINGS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.8},
    "penalty": {"repetition_penalty": 4.0},
    "all": {"temperature": 1.3, "top_k": 8, "top_p": 0.9, "repetition_penalty": 1.6},
}
PROMPT = [1, 7, 2]
COUNT = 1000


def reference(model, prefix: list[int], sampling: Sampling) -> torch.Tensor:
    """Probability of the next token, fp64 [V]."""
    ids = torch.tensor([prefix])
    with torch.no_grad():
        logits = model(ids)[:, -1]
    steps = []
    if sampling.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    steps.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k is not None:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(sampling.top_p))
    for step in steps:
        logits = step(ids, logits)
    return torch.softmax(logits[0].double(), -1)


def expected_pairs(model, sampling: Sampling) -> torch.Tensor:
    """Exact probability of (2nd, 3rd) new token under plain decoding, the first summed out."""
    total = torch.zeros(VOCABULARY, VOCABULARY, dtype=torch.float64)
    first = reference(model, PROMPT, sampling)
    for a in range(VOCABULARY):
        second = reference(model, [*PROMPT, a], sampling)
        for b in range(VOCABULARY):
            total[b] += first[a] * second[b] * reference(model, [*PROMPT, a, b], sampling)
    return total


def sampled_pairs(model, sampling: Sampling, count: int = COUNT, **options) -> torch.Tensor:
    """Counts of (2nd, 3rd) new tokens over many seeds, [V, V]."""
    pairs = torch.zeros(VOCABULARY, VOCABULARY)
    runs = generate_batch(
        model, [PROMPT] * count, batch_size=250, max_new_tokens=3, sampling=sampling, **options
    )
    for run in runs:
        pairs[run.tokens[1], run.tokens[2]] += 1
    return pairs


def p_value(observed: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Chi-square over the cells with enough mass, the rest pooled."""
    impossible = probabilities.flatten() == 0
    if observed.flatten()[impossible].any():
        return 0.0
    expected = (probabilities * observed.sum()).flatten()
    observed = observed.flatten().double()
    big = expected >= 5
    pool = expected[~big].sum()
    cells, seen = expected[big], observed[big]
    if pool > 1:
        cells, seen = torch.cat([cells, pool[None]]), torch.cat([seen, observed[~big].sum()[None]])
    return float(chisquare(seen, cells * seen.sum() / cells.sum()).pvalue)


def without_correction(drafts, draft_probabilities, target, uniform, limit=None):
    """Draws from p instead of (p - q)+ after a rejection."""
    accepted, _ = verify(drafts, draft_probabilities, target, uniform, limit)
    row = target[torch.arange(len(target)), accepted]
    return accepted, draw(row, uniform[:, -1])


@pytest.fixture(scope="module")
def model():
    return make_model(seed=3, scale=3.0)


@pytest.mark.parametrize("name", SETTINGS)
def test_output_is_distributed_as_ar_and_a_wrong_sampler_is_caught(model, name, monkeypatch):
    sampling = Sampling(**{"temperature": 1.0, **SETTINGS[name]})
    probabilities = expected_pairs(model, sampling)
    assert p_value(sampled_pairs(model, sampling, block_size=3), probabilities) > 1e-3
    monkeypatch.setattr(engine, "verify", without_correction)
    wrong = sampled_pairs(model, sampling, block_size=3)
    assert p_value(wrong, probabilities) < 1e-6


def test_a_setting_left_out_is_caught(model):
    """Power of the same test against output that follows the plain distribution instead."""
    plain = sampled_pairs(model, Sampling(temperature=1.0), block_size=3)
    for name in SETTINGS.keys() - {"plain"}:
        sampling = Sampling(**{"temperature": 1.0, **SETTINGS[name]})
        assert p_value(plain, expected_pairs(model, sampling)) < 1e-6, name


@pytest.mark.parametrize("options", [{"blocks": [1]}, {"blocks": [1, 3]}, {"method": "ar"}])
def test_fewer_blocks_and_plain_steps_have_the_same_distribution(model, options):
    sampling = Sampling(temperature=1.0, top_p=0.9)
    own = sampled_pairs(model, sampling, **{"block_size": 3, **options})
    assert p_value(own, expected_pairs(model, sampling)) > 1e-3


def test_verify_is_exact_for_random_distributions():
    """Two drafts, whatever q is: the first token produced follows p, and so does the second."""
    generator = torch.Generator().manual_seed(0)
    p = torch.softmax(torch.randn(3, 6, generator=generator), -1)
    q = torch.softmax(torch.randn(2, 6, generator=generator), -1)
    count = 20000
    uniform = torch.rand(count, 5, generator=generator, dtype=torch.float64)
    drafts = draw(q.expand(count, 2, 6), uniform[:, :2])
    target = p.expand(count, 3, 6)
    accepted, token = verify(drafts, q.expand(count, 2, 6), target, uniform[:, 2:])
    first = torch.where(accepted > 0, drafts[:, 0], token)
    assert p_value(torch.bincount(first, minlength=6).float(), p[0].double()) > 1e-3
    second = torch.where(accepted > 1, drafts[:, 1], token)[accepted > 0]
    assert p_value(torch.bincount(second, minlength=6).float(), p[1].double()) > 1e-3
    third = token[accepted == 2]
    assert p_value(torch.bincount(third, minlength=6).float(), p[2].double()) > 1e-3


def test_verify_when_draft_and_target_agree_to_the_bit():
    p = torch.tensor([[[0.25, 0.75]]])
    for draft in (0, 1):
        for u in (0.0, 0.5, 1 - 2**-53):
            uniform = torch.full((1, 2), u, dtype=torch.float64)
            accepted, _ = verify(torch.tensor([[draft]]), p, torch.cat([p, p], 1), uniform)
            assert accepted.tolist() == [1]


def test_a_row_without_a_draft_accepts_none_and_draws_from_p():
    """Its drafts are left over from before; neither they nor their q may count."""
    p = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]).expand(2, 2, 2)
    q = torch.tensor([[[0.0, 1.0]]]).expand(2, 1, 2)
    uniform = torch.full((2, 2), 0.3, dtype=torch.float64)
    accepted, token = verify(torch.tensor([[1], [1]]), q, p, uniform, torch.tensor([1, 0]))
    assert accepted.tolist() == [1, 0]
    assert token.tolist() == [0, 1]
    best = torch.tensor([[1, 0], [1, 0]])
    accepted, token = verify_greedy(torch.tensor([[1], [1]]), best, torch.tensor([1, 0]))
    assert (accepted.tolist(), token.tolist()) == ([1, 0], [0, 1])


def test_draw_inverts_the_cumulative_distribution():
    weights = torch.tensor([[0.0, 2.0, 0.0, 6.0, 0.0]]).expand(5, 5)
    uniform = torch.tensor([0.0, 0.249, 0.25, 0.99, 1 - 2**-53], dtype=torch.float64)
    assert draw(weights, uniform).tolist() == [1, 1, 3, 3, 3]
    assert draw(weights[0], uniform[0]).tolist() == 1


def test_streams_depend_on_their_seed_and_purpose_alone():
    one, same = Uniforms(Sampling(seed=4), 0), Uniforms(Sampling(seed=4), 0)
    assert torch.equal(one.take(1500), torch.cat([same.take(700), same.take(800)]))
    others = [Uniforms(Sampling(seed=seed), stream).take(4) for seed, stream in ((4, 1), (5, 0))]
    assert not any(torch.equal(Uniforms(Sampling(seed=4), 0).take(4), other) for other in others)


def test_top_k_keeps_ties_and_top_p_keeps_the_first():
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0])
    kept = Sampling(temperature=1.0, top_k=2).probabilities(logits) > 0
    assert kept.tolist() == [False, True, True, True, False]
    kept = Sampling(temperature=1.0, top_p=1e-6).probabilities(logits)
    assert kept.tolist() == [0.0, 1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("method", ["ar", "tidar"])
def test_same_seed_same_tokens_other_seed_other_tokens(model, method):
    runs = [
        generate(model, [1, 2], method=method, temperature=1.0, seed=seed, max_new_tokens=20).tokens
        for seed in (5, 5, 6)
    ]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature: must be 0"),
        ({"trust": 1.5}, "trust: must be in"),
        ({"top_k": 0}, "top_k: must be at least 1"),
        ({"top_p": 0.0}, "top_p: must be above 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: must be above 0"),
    ],
)
def test_bad_settings_name_themselves(options, message):
    with pytest.raises(UserError, match=message):
        Sampling(**options)
