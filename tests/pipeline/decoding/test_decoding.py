"""Decoding: greedy equality, exact distribution, exact cache, limits, and clear errors."""

import pytest
import torch
from scipy.stats import chisquare

from data_prep.errors import UserError
from pipeline.decoding import generate, verify
from pipeline.decoding.autoregressive import decode_ar
from pipeline.decoding.cache import KVCache
from pipeline.decoding.sampling import Sampling, draw
from pipeline.decoding.step import block_rows, num_queries, prefill_mask, step_mask, step_positions
from pipeline.decoding.tidar import decode_tidar, room_needed
from pipeline.model.config import ModelConfig
from pipeline.model.mask import dense_mask
from pipeline.model.transformer import Transformer

VOCABULARY = 13
MASK = 12


def make_model(
    seed: int = 0, scale: float = 8.0, vocabulary: int = VOCABULARY, **changes
) -> Transformer:
    """A small random model whose logits are spread out enough to be worth verifying."""
    values = {
        "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4,
        "num_kv_heads": 2, "head_dim": 8, "vocab_size": vocabulary, "mask_token_id": MASK,
        "block_size": 4, "qk_norm": True, **changes,
    }  # fmt: skip
    model = Transformer(ModelConfig(**values)).initialize(seed).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    return model


@pytest.fixture(scope="module")
def model() -> Transformer:
    return make_model()


def step_rule(block_size: int, prefix: int) -> torch.Tensor:
    """Who sees whom in a decoding step, written out; columns: prefix, drafts, blocks."""
    rows = [("draft", i, 0) for i in range(block_size)]
    rows += [("slot", t, j) for j in range(1, block_size + 1) for t in range(block_size)]
    allowed = torch.zeros(len(rows), prefix + len(rows), dtype=torch.bool)
    allowed[:, :prefix] = True
    for q, (kind, index, block) in enumerate(rows):
        for k, (other, key_index, key_block) in enumerate(rows):
            if kind == "draft":
                seen = other == "draft" and key_index <= index
            elif other == "draft":
                seen = key_index < block
            else:
                seen = key_block == block
            allowed[q, prefix + k] = seen
    return allowed


@pytest.mark.parametrize("block_size", [1, 2, 3, 5])
def test_step_mask_is_the_rule(block_size):
    device = torch.device("cpu")
    mask = step_mask(block_size, 9, device)
    assert len(mask) == num_queries(block_size)
    for prefix in (0, 4, 9):
        assert torch.equal(mask[:, 9 - prefix :], step_rule(block_size, prefix))
    positions = step_positions(block_size, device)
    for block in range(1, block_size + 1):
        expected = list(range(block, block + block_size))
        assert positions[block_rows(block_size, block)].tolist() == expected


@pytest.mark.parametrize("accepted", [1, 2, 3])
def test_a_step_sees_what_training_showed(model, accepted):
    """Block j of a step has the logits that the training forward gives that block's slots."""
    block_size, tokens = 3, [1, 4, 2, 8, 5, 7, 3]
    prefix = len(tokens) - block_size
    step = torch.tensor([tokens[prefix:] + [MASK] * block_size**2])
    cache = KVCache(model.config, 64, dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        model(torch.tensor([tokens[:prefix]]), cache=cache)
        cache.keep(prefix)
        positions = prefix + step_positions(block_size, torch.device("cpu"))
        got = model(step, positions, step_rule(block_size, prefix), cache)[0]
        start = prefix + accepted
        clean = tokens[:start] + [0] * block_size
        lengths = [len(clean)]
        layout = one_block_layout(start, start + block_size)
        ids = torch.tensor([clean + [MASK] * block_size])
        position = torch.cat([torch.arange(len(clean)), torch.arange(start, start + block_size)])
        expected = model(ids, position, dense_mask(lengths, layout))[0]
    block = got[block_rows(block_size, accepted)]
    torch.testing.assert_close(block, expected[len(clean) :], atol=2e-5, rtol=1e-5)
    drafts = expected[prefix : prefix + accepted]
    torch.testing.assert_close(got[:accepted], drafts, atol=2e-5, rtol=1e-5)


def one_block_layout(start: int, end: int):
    from data_prep.layout import Layout

    return Layout.from_table([[0, start, end, 0]])


def test_prefill_mask():
    mask = prefill_mask(3, 2, torch.device("cpu"))
    assert mask.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1],
    ]


@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 8])
def test_greedy_tidar_equals_greedy_ar(block_size):
    """Also with an untied, random head, where hardly any draft is accepted."""
    for seed in range(4):
        model = make_model(seed, vocabulary=40, tie_embeddings=seed % 2 == 0)
        generator = torch.Generator().manual_seed(seed)
        for length in (1, 5, 17):
            prompt = torch.randint(0, 40, (length,), generator=generator)
            expected = generate(model, prompt, method="ar", max_new_tokens=30)
            got = generate(model, prompt, block_size=block_size, max_new_tokens=30)
            assert got.tokens == expected.tokens
            assert expected.forwards == 30
            assert sum(got.accepted) >= 29
            assert all(1 <= accepted <= block_size for accepted in got.accepted)


def test_some_drafts_are_accepted_and_save_forwards():
    """A model that repeats one token drafts perfectly: K tokens come out of every step."""
    model = make_model(scale=1.0, tie_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[5] = 1.0
        model.model.norm.weight.zero_()  # equal logits; argmax is token 0 for all
    result = generate(model, [1, 2], block_size=4, max_new_tokens=21)
    assert result.accepted == [4] * 5
    assert result.forwards == 6
    assert result.forward_of_token == [0] + [step for step in range(1, 6) for _ in range(4)]


def reference_probabilities(model: Transformer, prefix: list[int], temperature: float):
    with torch.no_grad():
        logits = model(torch.tensor([prefix]))[0, -1]
    return torch.softmax(logits / temperature, -1).double()


def sample_pairs(model: Transformer, prompt: list[int], count: int, block_size: int):
    """Counts of (2nd, 3rd) new tokens given the first, over many seeds; [V, V]."""
    pairs = torch.zeros(VOCABULARY, VOCABULARY)
    firsts = []
    for seed in range(count):
        tokens = generate(
            model, prompt, block_size=block_size, max_new_tokens=3, temperature=1.0, seed=seed
        ).tokens
        firsts.append(tokens[0])
        pairs[tokens[1], tokens[2]] += 1
    return firsts, pairs


def expected_pairs(model: Transformer, prompt: list[int]) -> torch.Tensor:
    """Exact probability of (2nd, 3rd) new token under plain decoding, the first summed out."""
    total = torch.zeros(VOCABULARY, VOCABULARY, dtype=torch.float64)
    first = reference_probabilities(model, prompt, 1.0)
    for a in range(VOCABULARY):
        second = reference_probabilities(model, [*prompt, a], 1.0)
        for b in range(VOCABULARY):
            third = reference_probabilities(model, [*prompt, a, b], 1.0)
            total[b] += first[a] * second[b] * third
    return total


def p_value(observed: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Chi-square over the cells with enough mass, the rest pooled."""
    count = observed.sum()
    expected = (probabilities * count).flatten()
    observed = observed.flatten().double()
    big = expected >= 5
    pool = [expected[~big].sum()[None]] if not big.all() else []
    cells = torch.cat([expected[big], *pool])
    seen = torch.cat([observed[big], *([observed[~big].sum()[None]] if pool else [])])
    return float(chisquare(seen, cells * seen.sum() / cells.sum()).pvalue)


def wrong_verify(drafts, draft_probabilities, target, generator):
    """Leaves out the correction after a rejection: draws from p instead of (p - q)+."""
    accepted, _ = verify.verify(drafts, draft_probabilities, target, generator)
    return accepted, int(draw(target[accepted][None], generator))


def test_sampled_output_is_distributed_as_ar_and_a_wrong_sampler_is_caught(monkeypatch):
    model = make_model(seed=3, scale=3.0)
    prompt = [1, 7, 2]
    probabilities = expected_pairs(model, prompt)
    firsts, pairs = sample_pairs(model, prompt, 2500, block_size=3)
    first_counts = torch.bincount(torch.tensor(firsts), minlength=VOCABULARY)
    assert p_value(first_counts, reference_probabilities(model, prompt, 1.0)) > 1e-3
    assert p_value(pairs, probabilities) > 1e-3
    monkeypatch.setattr("pipeline.decoding.tidar.verify", wrong_verify)
    _, wrong = sample_pairs(model, prompt, 2500, block_size=3)
    assert p_value(wrong, probabilities) < 1e-6


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_verify_is_exact_for_random_distributions(temperature):
    """One draft, one position: the produced token follows p whatever q is."""
    generator = torch.Generator().manual_seed(0)
    p = torch.softmax(torch.randn(6, generator=generator) / temperature, -1)
    q = torch.softmax(torch.randn(6, generator=generator), -1)
    counts = torch.zeros(6)
    for _ in range(6000):
        draft = draw(q[None], generator)
        accepted, token = verify.verify(draft, q[None], torch.stack([p, p]), generator)
        counts[int(draft) if accepted else token] += 1
    assert p_value(counts, p.double()) > 1e-3


def test_verify_when_draft_and_target_agree_to_the_bit():
    p = torch.tensor([[0.25, 0.75]])
    generator = torch.Generator().manual_seed(1)
    for draft in (0, 1):
        accepted, _ = verify.verify(torch.tensor([draft]), p, torch.cat([p, p]), generator)
        assert accepted == 1


@pytest.mark.parametrize("method", ["ar", "tidar"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_cache_holds_what_plain_decoding_would(model, method, temperature):
    prompt = torch.tensor([3, 1, 4, 1, 5])
    cache = KVCache(model.config, room_needed(5, 40, 4), dtype=torch.float32, device=prompt.device)
    sampling = Sampling(temperature=temperature, seed=2)
    if method == "tidar":
        steps = decode_tidar(model, prompt, cache, sampling, block_size=4, mask_token_id=MASK)
    else:
        steps = decode_ar(model, prompt, cache, sampling)
    tokens = prompt.tolist()
    with torch.inference_mode():
        for _ in range(8):
            tokens += next(steps)
            assert cache.length == len(tokens) - 1  # the last token is not cached yet
            fresh = KVCache(model.config, 128, dtype=torch.float32, device=prompt.device)
            model(torch.tensor([tokens[:-1]]), cache=fresh)
            fresh.keep(len(tokens) - 1)
            for layer in range(model.config.num_layers):
                for kept, expected in zip(cache.kept(layer), fresh.kept(layer), strict=True):
                    torch.testing.assert_close(kept, expected, atol=1e-5, rtol=1e-5)


def test_trust_below_one_follows_the_mixture(model):
    """Greedy with trust 0 takes the diffusion argmax, so it differs from AR; 1 does not."""
    prompt = [1, 2, 3]
    ar = generate(model, prompt, method="ar", max_new_tokens=24)
    outputs = {trust: generate(model, prompt, trust=trust, max_new_tokens=24) for trust in (0, 1)}
    assert outputs[1].tokens == ar.tokens
    assert outputs[0].tokens != ar.tokens
    assert outputs[0].accepted == [4] * len(outputs[0].accepted)  # it always agrees with itself


def test_same_seed_same_tokens_other_seed_other_tokens(model):
    runs = [
        generate(model, [1, 2], temperature=1.0, seed=seed, max_new_tokens=20).tokens
        for seed in (5, 5, 6)
    ]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("method", ["ar", "tidar"])
def test_stops_after_eos_and_at_the_limit(model, method):
    long = generate(model, [1, 2], method=method, max_new_tokens=24)
    assert len(long.tokens) == len(long.forward_of_token) == 24
    eos = long.tokens[9]
    first = long.tokens.index(eos)
    stopped = generate(model, [1, 2], method=method, max_new_tokens=24, eos_id=eos)
    assert stopped.tokens == long.tokens[: first + 1]
    assert generate(model, [1, 2], method=method, max_new_tokens=1).tokens == long.tokens[:1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_ids": []}, "prompt: is empty"),
        ({"prompt_ids": [VOCABULARY]}, "prompt: holds token 13"),
        ({"prompt_ids": [1], "method": "beam"}, "known are tidar, ar"),
        ({"prompt_ids": [1], "max_new_tokens": 0}, "max_new_tokens: must be at least 1"),
        ({"prompt_ids": [1], "max_new_tokens": 5000}, "exceed the model's 4096 positions"),
        ({"prompt_ids": [1], "block_size": 0}, "block_size: must be at least 1"),
        ({"prompt_ids": [1], "temperature": -1.0}, "temperature: must be 0"),
        ({"prompt_ids": [1], "trust": 1.5}, "trust: must be in"),
    ],
)
def test_bad_arguments_name_themselves(model, arguments, message):
    with pytest.raises(UserError, match=message):
        generate(model, **arguments)


def test_a_model_without_mask_token_cannot_draft():
    model = make_model(mask_token_id=None, block_size=None)
    with pytest.raises(UserError, match="block_size: this model has none"):
        generate(model, [1])
    with pytest.raises(UserError, match="no mask token"):
        generate(model, [1], block_size=2)
    assert len(generate(model, [1], method="ar", max_new_tokens=3).tokens) == 3
