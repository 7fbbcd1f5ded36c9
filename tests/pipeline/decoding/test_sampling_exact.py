"""Sampled output has the distribution of plain decoding, under every setting; with power checks.

The reference is written with the logit processors of transformers, on full forwards without cache.
"""

from dataclasses import replace

import pytest
import torch
from decoding_models import CPU, MASK, VOCABULARY, make_model
from scipy.stats import chisquare
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pipeline.decoding import Sampling, engine, generate
from pipeline.decoding.drafting import Drafter
from pipeline.decoding.engine import StepEngine
from pipeline.decoding.sampling import PIECE, Uniforms, draw, verify, verify_greedy
from pipeline.decoding.step import StepShape, prefill_mask
from tidar_common.errors import UserError

SETTINGS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.8},
    "penalty": {"repetition_penalty": 4.0},
    "all": {"temperature": 1.3, "top_k": 8, "top_p": 0.9, "repetition_penalty": 1.6},
}
PROMPT = [1, 7, 2]
ROWS = 3000
"""Texts drawn side by side, in one batch that starts from one prompt."""


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


@torch.inference_mode()
def sampled_texts(model, sampling: Sampling, shape: StepShape, same_stream=False) -> torch.Tensor:
    """First three new tokens of `ROWS` texts with seeds of their own, int64 [ROWS, 3].

    The rows are admitted together: they have the same prompt, so its cache is copied.
    """
    engine = StepEngine(model, sampling, shape, batch_size=ROWS, capacity=len(PROMPT) + 12)
    prompt, size = torch.tensor(PROMPT), engine.shape.prefill_slots
    engine.admit(0, prompt, 0)
    for number in range(model.config.num_layers):
        layer = engine.cache.layer(number)
        layer[:, 1:] = layer[:, :1]
    if engine.state.seen is not None:
        engine.state.seen[:] = engine.state.seen[:1]
    for row in range(ROWS):
        engine.streams.start(row, replace(sampling, seed=row))
        if same_stream:
            engine.streams._draft[row] = Uniforms(replace(sampling, seed=row), 0)
            engine.streams._draft[row].take(2)  # a draft's number is the one that judges it
    queries = torch.cat([prompt, torch.full((size,), MASK)])[None]
    mask = prefill_mask(0, len(prompt), size, CPU, model.config.causal_slots)
    hidden = model.hidden(queries, torch.arange(queries.shape[1]), mask).expand(ROWS, -1, -1)
    last, block = hidden[:, len(prompt) - 1 : len(prompt)], hidden[:, len(prompt) :]
    first = engine._begin(slice(None), last, block, engine._uniforms(range(ROWS), 1))
    for row in range(ROWS):
        engine._start_row(row, len(prompt))
    texts = [[token] for token in first.tolist()]
    while min(map(len, texts)) < 3:
        for text, new in zip(texts, engine.step(), strict=True):
            text += new
    return torch.tensor([text[:3] for text in texts])


def sampled_pairs(model, sampling, shape=None, **options) -> torch.Tensor:
    """Counts of (2nd, 3rd) new tokens, [V, V]."""
    texts = sampled_texts(model, sampling, shape or StepShape.full(3), **options)
    return pair_counts(texts[:, 1], texts[:, 2])


def first_counts(texts: torch.Tensor) -> torch.Tensor:
    """Counts of the first new token, [V]."""
    return torch.bincount(texts[:, 0], minlength=VOCABULARY).float()


def pair_counts(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    counts = torch.bincount(left * VOCABULARY + right, minlength=VOCABULARY**2)
    return counts.view(VOCABULARY, VOCABULARY).float()


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


def accept_always(drafts, draft_probabilities, target, uniform, limit=None):
    """Takes the drafter's word for everything."""
    accepted = torch.full_like(drafts[:, 0], drafts.shape[1]) if drafts.shape[1] else 0
    accepted = torch.minimum(torch.as_tensor(accepted).expand(len(drafts)), limit)
    row = target[torch.arange(len(target)), accepted]
    return accepted, draw(row, uniform[:, -1])


@pytest.fixture(scope="module")
def model():
    return make_model(seed=3, scale=3.0)


@pytest.mark.parametrize("name", SETTINGS)
def test_output_is_distributed_as_ar_and_wrong_samplers_are_caught(model, name, monkeypatch):
    sampling = Sampling(**{"temperature": 1.0, **SETTINGS[name]})
    probabilities = expected_pairs(model, sampling)
    texts = sampled_texts(model, sampling, StepShape.full(3))
    assert p_value(pair_counts(texts[:, 1], texts[:, 2]), probabilities) > 1e-3
    assert p_value(first_counts(texts), reference(model, PROMPT, sampling)) > 1e-3
    assert p_value(sampled_pairs(model, sampling, same_stream=True), probabilities) < 1e-6
    for wrong in (without_correction, accept_always):
        monkeypatch.setattr(engine, "verify", wrong)
        assert p_value(sampled_pairs(model, sampling), probabilities) < 1e-6, wrong.__name__


@pytest.mark.parametrize("trust", [0.5, 0.0])
def test_trust_below_one_is_the_law_of_the_mixed_logits_and_not_that_of_ar(model, trust):
    """The joint law of the first two tokens, for which the prompt's block has slots 0 and 1."""
    texts = sampled_texts(model, Sampling(temperature=1.0, trust=trust), StepShape.full(3))
    observed = pair_counts(texts[:, 0], texts[:, 1])
    with torch.no_grad():
        ids = torch.tensor([[*PROMPT, MASK, MASK, MASK]])
        own = model(ids, torch.arange(6), prefill_mask(0, 3, 3, CPU))[0, 3:5]
        ar = model(torch.tensor([PROMPT]))[0, -1]
        rest = torch.cat([model(torch.tensor([[*PROMPT, a]]))[:, -1] for a in range(VOCABULARY)])

    def law(trust: float) -> torch.Tensor:
        first = torch.softmax((trust * ar + (1 - trust) * own[0]).double(), -1)
        second = torch.softmax((trust * rest + (1 - trust) * own[1]).double(), -1)
        return first[:, None] * second

    assert p_value(observed, law(trust)) > 1e-3
    assert p_value(observed, law(1.0)) < 1e-6


def test_a_setting_left_out_is_caught(model):
    """Power of the same test against output that follows the plain distribution instead."""
    texts = sampled_texts(model, Sampling(temperature=1.0), StepShape.full(3))
    plain = pair_counts(texts[:, 1], texts[:, 2])
    for name in SETTINGS.keys() - {"plain"}:
        sampling = Sampling(**{"temperature": 1.0, **SETTINGS[name]})
        assert p_value(plain, expected_pairs(model, sampling)) < 1e-6, name
        assert p_value(first_counts(texts), reference(model, PROMPT, sampling)) < 1e-6, name


SHAPES = [StepShape(3, 3, (1,)), StepShape(3, 3, (1, 3)), StepShape(3, 3), StepShape(1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_fewer_blocks_and_plain_steps_have_the_same_distribution(model, shape):
    sampling = Sampling(temperature=1.0, top_p=0.9)
    assert p_value(sampled_pairs(model, sampling, shape), expected_pairs(model, sampling)) > 1e-3


@pytest.fixture(scope="module")
def in_order():
    """A head whose weights are large and random: drafts differ much from the verifier's."""
    return make_model(seed=3, scale=3.0, draft_rank=6, draft_width=8)


NO_BLOCKS = StepShape(3, 3, ())
WITH_HEAD = {
    "all blocks": (StepShape.full(3), "plain"),
    "all blocks, all settings": (StepShape.full(3), "all"),
    "some blocks": (StepShape(3, 3, (2,)), "penalty"), "no block": (NO_BLOCKS, "plain"),
    "no block, all settings": (NO_BLOCKS, "all"), "one block": (StepShape.one_block(3), "plain"),
    "one block, all settings": (StepShape.one_block(3), "all"),
}  # fmt: skip


@pytest.mark.parametrize("name", WITH_HEAD)
def test_a_sequential_draft_is_verified_by_what_it_was_drawn_from(in_order, name, monkeypatch):
    """Exact whatever the head is; and where q is not what drafts were drawn from, it shows."""
    shape, settings = WITH_HEAD[name]
    sampling = Sampling(**{"temperature": 1.0, **SETTINGS[settings]})
    probabilities = expected_pairs(in_order, sampling)
    assert p_value(sampled_pairs(in_order, sampling, shape), probabilities) > 1e-3
    original = Drafter.draw

    def blind(self, *arguments):
        """q of a draft that does not know the token before: that of another one."""
        draft = original(self, *arguments)
        assert draft.probabilities is not None
        return replace(draft, probabilities=draft.probabilities.roll(1, dims=0))

    monkeypatch.setattr(Drafter, "draw", blind)
    assert p_value(sampled_pairs(in_order, sampling, shape), probabilities) < 1e-6


@pytest.mark.parametrize("cell", ["linear", "mlp"])
def test_simpler_cells_are_exact_too(cell):
    model = make_model(seed=3, scale=3.0, draft_rank=6, draft_width=8, draft_cell=cell)
    sampling = Sampling(temperature=1.0)
    for shape in (StepShape.full(3), NO_BLOCKS):
        observed = sampled_pairs(model, sampling, shape)
        assert p_value(observed, expected_pairs(model, sampling)) > 1e-3


def test_causal_slots_leave_the_distribution_alone():
    """Other drafts than those of slots that see each other, and the same law."""
    texts = []
    for causal_slots in (True, False):
        model = make_model(seed=3, scale=3.0, causal_slots=causal_slots)
        sampling = Sampling(temperature=1.0)
        texts.append(sampled_pairs(model, sampling))
        assert p_value(texts[-1], expected_pairs(model, sampling)) > 1e-3
    assert not torch.equal(*texts)


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


def test_a_draft_that_the_target_rules_out_is_never_accepted():
    """Not even by the smallest number that can be drawn."""
    p = torch.tensor([[[0.0, 1.0], [0.5, 0.5]]])
    uniform = torch.zeros(1, 2, dtype=torch.float64)
    accepted, token = verify(torch.tensor([[0]]), torch.tensor([[[1.0, 0.0]]]), p, uniform)
    assert (accepted.tolist(), token.tolist()) == ([0], [1])


def test_a_row_without_a_draft_accepts_none_and_draws_from_p():
    """Its drafts are left over from before; neither they nor their q may count."""
    p = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]).expand(2, 2, 2)
    q = torch.tensor([[[0.0, 1.0]]]).expand(2, 1, 2)
    uniform = torch.full((2, 2), 0.3, dtype=torch.float64)
    accepted, token = verify(torch.tensor([[1], [1]]), q, p, uniform, torch.tensor([1, 0]))
    assert accepted.tolist() == [1, 0]
    assert token.tolist() == [0, 1]
    even, high = torch.full((1, 2, 2), 0.5), torch.full((1, 2), 0.9, dtype=torch.float64)
    _, token = verify(torch.tensor([[1]]), q[:1], even, high, torch.tensor([0]))
    assert token.tolist() == [1], "p less a left-over q would give 0"
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
    at_the_edge = torch.tensor([0.5, 0.25, 0.25]).log()  # the first alone reaches it
    kept = Sampling(temperature=1.0, top_p=0.5).probabilities(at_the_edge)
    assert kept.tolist() == [1.0, 0.0, 0.0]


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


def test_draw_of_a_large_vocabulary_is_that_of_one_running_sum():
    """Found piece by piece: the same token as by the whole cumulative sum, also where most weights
    are 0, at the edges of pieces and of the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    for size in (PIECE - 1, PIECE, PIECE + 1, 5 * PIECE + 3):
        weights = torch.rand(64, size, generator=generator) ** 8
        weights[:32] *= torch.rand(32, size, generator=generator) < 3 / size
        weights[:, size - 1] += 1e-3
        uniform = torch.rand(64, generator=generator, dtype=torch.float64)
        cumulative = weights.double().cumsum(-1)
        place = (uniform * cumulative[:, -1])[:, None]
        expected = torch.searchsorted(cumulative, place, right=True)[:, 0]
        token = draw(weights, uniform)
        assert torch.equal(token, expected)
        assert (weights.gather(1, token[:, None]) > 0).all()


def test_draw_gives_a_token_even_of_weights_that_are_no_numbers():
    weights = torch.full((2, 3 * PIECE), torch.nan)
    token = draw(weights, torch.tensor([0.0, 0.9], dtype=torch.float64))
    assert ((token >= 0) & (token < 3 * PIECE)).all()
