"""Acceptance on held-out text against an oracle: dense loops, one causal forward a position."""

import math

import numpy as np
import pytest
import torch

from data_prep.formats.groups import PackedSequence
from data_prep.layout import build_layout
from pipeline.evals import scoring
from pipeline.evals.acceptance import (
    BINS,
    Controls,
    DraftScores,
    PairCounts,
    binned,
    describe_calibration,
    empty_bins,
    score_drafts,
)
from pipeline.model.config import ModelConfig
from pipeline.model.transformer import Transformer

VOCABULARY, MASK = 14, 13
UNIGRAM_IDS = 12
"""The unigram knows fewer ids than the model has embeddings."""
DRAFTS = ("model", "unigram", "bigram")


@pytest.fixture(scope="module")
def model() -> Transformer:
    config = ModelConfig(
        hidden_size=24, intermediate_size=32, num_layers=2, num_heads=3, num_kv_heads=1,
        head_dim=8, vocab_size=VOCABULARY, mask_token_id=MASK, block_size=3,
    )  # fmt: skip
    model = Transformer(config).initialize(1).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8.0)
    return model


@pytest.fixture(scope="module")
def controls() -> Controls:
    """Random ones; tokens 3 and 11 have no successor."""
    rng = torch.Generator().manual_seed(2)
    unigram = torch.softmax(torch.randn(UNIGRAM_IDS, generator=rng), 0)
    first, second = torch.randint(UNIGRAM_IDS, (2, 90), generator=rng)
    known = (first != 3) & (first != 11)
    keys = (first * UNIGRAM_IDS + second)[known]
    return Controls(unigram, PairCounts.from_keys(keys, UNIGRAM_IDS))


def table(controls: Controls) -> list[list[float]]:
    """The bigram draft behind each token by loops over its pairs, [V', V]."""
    pairs, unigram = controls.pairs, controls.unigram.tolist()
    rows = []
    for token in range(UNIGRAM_IDS):
        own = range(int(pairs.starts[token]), int(pairs.starts[token + 1]))
        seen = {int(pairs.successors[n]): int(pairs.counts[n]) for n in own}
        total, kinds = sum(seen.values()), len(seen)
        row = [
            (seen.get(v, 0) + kinds * unigram[v]) / (total + kinds) if seen else unigram[v]
            for v in range(UNIGRAM_IDS)
        ]
        rows.append(row + [0.0] * (VOCABULARY - UNIGRAM_IDS))
    return rows


def sequences(block_size: int) -> list[PackedSequence]:
    """Several documents with padding, one whole document, documents of one token."""
    made = []
    for seed, (lengths, padding) in enumerate([([7, 2, 4], 3), ([16], 0), ([1, 1, 9], 5)]):
        rng = np.random.default_rng(seed)
        tokens = rng.integers(0, UNIGRAM_IDS, size=16)
        documents = np.array([*lengths, padding] if padding else lengths)
        layout = build_layout(lengths, block_size, shift=True, rng=rng)
        made.append(PackedSequence(tokens, documents, layout, padding=padding))
    return made


def causal(model: Transformer, tokens: list[int]) -> torch.Tensor:
    """The verifier's distribution after `tokens`, [V]."""
    return torch.softmax(model(torch.tensor([tokens]))[0, -1], -1)


def drafted(model: Transformer, prefix: list[int], count: int) -> torch.Tensor:
    """Distributions of `count` mask slots behind `prefix`, by a mask written out, [count, V]."""
    total = len(prefix) + count
    mask = torch.zeros(total, total, dtype=torch.bool)
    for query in range(total):
        for key in range(total):
            mask[query, key] = key <= query or query >= len(prefix)
    logits = model(torch.tensor([prefix + [MASK] * count]), mask=mask)[0, len(prefix) :]
    return torch.softmax(logits, -1)


def blocks_of(sequence: PackedSequence) -> list[tuple[list[int], int, int]]:
    """(its document's tokens, block start, block end) of each block; places in the document."""
    layout = sequence.layout
    ends = np.cumsum(sequence.real_lengths)
    found = []
    for first, start, end in zip(
        layout.prefix_start, layout.prefix_end, layout.draft_end, strict=True
    ):
        document_end = int(min(e for e in ends if e > start))
        found.append((sequence.tokens[first:document_end].tolist(), start - first, end - first))
    return found


@torch.no_grad()
def oracle(
    model: Transformer, chosen: list[PackedSequence], block_size: int, controls: Controls
) -> dict:
    """All sums of `DraftScores` by loops over documents, blocks, positions and tokens."""
    sums = {
        "ar_loss": 0.0, "ar_tokens": 0, "unigram_loss": 0.0, "diffusion_loss": 0.0,
        "diffusion_tokens": 0, "drafts": [0.0] * (block_size - 1),
        **{
            what: {name: [[0.0] * (block_size - 1) for _ in range(2)] for name in DRAFTS}
            for what in ("accepted", "survived")
        },
        "calibration": [[0.0] * BINS for _ in range(4)],
    }  # fmt: skip
    base = [float(p) for p in controls.unigram] + [0.0] * (VOCABULARY - UNIGRAM_IDS)
    pairs = table(controls)
    for sequence in chosen:
        start = 0
        for length in map(int, sequence.real_lengths):
            document = sequence.tokens[start : start + length].tolist()
            start += length
            for position in range(1, length):
                token = document[position]
                sums["ar_loss"] -= math.log(float(causal(model, document[:position])[token]))
                sums["unigram_loss"] -= math.log(base[token])
                sums["ar_tokens"] += 1
        for document, first, end in blocks_of(sequence):
            drafts = drafted(model, document[:first], end - first)
            alive = {name: [1.0, 1.0] for name in DRAFTS}
            for place in range(end - first):
                position = first + place
                sums["diffusion_loss"] -= math.log(float(drafts[place][document[position]]))
                sums["diffusion_tokens"] += 1
                if place == 0 or first == 0:
                    continue
                p = causal(model, document[:position]).tolist()
                sums["drafts"][place - 1] += 1
                own = drafts[place].tolist()
                likeliest = own.index(max(own))
                tenth = next(
                    number for number in range(BINS) if own[likeliest] <= (number + 1) / BINS
                )
                right, verified = likeliest == document[position], likeliest == p.index(max(p))
                for row, value in enumerate((1, own[likeliest], right, verified)):
                    sums["calibration"][row][tenth] += value
                for name, q in zip(DRAFTS, (own, base, pairs[document[position - 1]]), strict=True):
                    agrees = max(range(VOCABULARY), key=lambda v, p=p: p[v]) == max(
                        range(VOCABULARY), key=lambda v, q=q: q[v]
                    )
                    overlap = sum(map(min, zip(p, q, strict=True)))
                    for row, chance in enumerate((agrees, overlap)):
                        sums["accepted"][name][row][place - 1] += chance
                        alive[name][row] *= chance
                        sums["survived"][name][row][place - 1] += alive[name][row]
    return sums


def check(scores: DraftScores, expected: dict) -> None:
    for name in ("ar_tokens", "diffusion_tokens"):
        assert getattr(scores, name) == expected[name]
    for name in ("ar_loss", "unigram_loss", "diffusion_loss"):
        assert getattr(scores, name) == pytest.approx(expected[name], rel=1e-4)
    for name in ("drafts", "calibration"):
        wanted = torch.tensor(expected[name], dtype=torch.float64)
        torch.testing.assert_close(getattr(scores, name), wanted, rtol=1e-3, atol=1e-4)
    for name in ("accepted", "survived"):
        assert tuple(getattr(scores, name)) == DRAFTS
        for draft, own in getattr(scores, name).items():
            wanted = torch.tensor(expected[name][draft], dtype=torch.float64)
            torch.testing.assert_close(own, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("block_size", [1, 2, 3, 5])
def test_scores_are_those_of_dense_loops(model, controls, block_size):
    chosen = sequences(block_size)
    scores = score_drafts(model, chosen, block_size, controls)
    expected = oracle(model, chosen, block_size, controls)
    check(scores, expected)
    if block_size > 1:  # or the comparison would be between zeros
        assert min(expected["drafts"]) > 0
        assert 0 < sum(expected["accepted"]["model"][1]) < sum(expected["drafts"])
        assert expected["accepted"]["bigram"] != expected["accepted"]["unigram"]
        assert sum(count > 0 for count in expected["calibration"][0]) > 2
        assert sum(expected["calibration"][0]) == sum(expected["drafts"])


def test_rows_at_a_time_do_not_change_the_scores(model, controls, monkeypatch):
    monkeypatch.setattr(scoring.pieces, "__defaults__", (3,))
    assert [part.stop for part in scoring.pieces(7)] == [3, 6, 7]
    chosen = sequences(3)
    check(score_drafts(model, chosen, 3, controls), oracle(model, chosen, 3, controls))


def test_parts_add_up(model, controls):
    chosen = sequences(3)
    parts = [score_drafts(model, [sequence], 3, controls) for sequence in chosen]
    whole = score_drafts(model, chosen, 3, controls)
    total = DraftScores.zero(3) + parts[0] + parts[1] + parts[2]
    torch.testing.assert_close(vars(total), vars(whole))
    assert not DraftScores.zero(3).drafts.any()


def test_a_model_that_knows_its_drafts_is_always_accepted(model, controls):
    """With all logits equal p and q are the same, and so is their argmax."""
    flat = Transformer(model.config).initialize(0).eval()
    with torch.no_grad():
        flat.model.norm.weight.zero_()
    scores = score_drafts(flat, sequences(3), 3, controls)
    torch.testing.assert_close(scores.accepted["model"][0], scores.drafts)
    torch.testing.assert_close(scores.accepted["model"][1], scores.drafts, rtol=1e-6, atol=1e-6)
    assert scores.ar_loss / scores.ar_tokens == pytest.approx(math.log(VOCABULARY), rel=1e-5)
    for control in ("unigram", "bigram"):
        assert (scores.accepted[control][1] < scores.drafts).all()


def test_a_twin_without_drafts_gives_its_ar_loss(model, controls):
    chosen = sequences(3)
    twin = Transformer(model.config.without_drafting()).eval()
    twin.load_state_dict(model.state_dict())
    scores, full = score_drafts(twin, chosen, 1, controls), score_drafts(model, chosen, 3, controls)
    assert scores.ar_loss == pytest.approx(full.ar_loss, rel=1e-5)
    assert (scores.diffusion_tokens, scores.diffusion_loss) == (0, 0.0)
    assert scores.drafts.numel() == 0


def test_a_unigram_of_another_vocabulary_is_refused(model):
    with pytest.raises(ValueError, match="2 tokens more than the model"):
        score_drafts(model, sequences(3), 3, Controls(torch.full((VOCABULARY + 2,), 1 / 16)))


def test_a_bigram_draft_is_a_distribution_behind_every_token(model, controls):
    before = torch.tensor([3, 0, 5, 5, 11, *range(UNIGRAM_IDS)])
    rows = controls.on(model).bigram(controls.pairs, before)
    torch.testing.assert_close(rows, torch.tensor(table(controls))[before])
    torch.testing.assert_close(rows.sum(-1), torch.ones(len(before)))
    alone = score_drafts(model, sequences(3), 3, Controls(controls.unigram))
    assert tuple(alone.accepted) == ("model", "unigram")


def test_calibration_is_described_by_bin():
    confidence = torch.tensor([0.05, 0.95, 0.91, 1.0], dtype=torch.float64)
    right = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    bins = binned(confidence, right, verified=torch.ones(4, dtype=torch.float64))
    found = describe_calibration(bins)
    assert found["draft_calibration"]["drafts"] == [1, *[0] * 8, 3]
    assert found["draft_calibration"]["right"] == [0.0, *[None] * 8, pytest.approx(2 / 3)]
    assert found["draft_calibration"]["verified"] == [1.0, *[None] * 8, 1.0]
    assert found["draft_calibration_error"] == pytest.approx((0.05 + (2.86 - 2)) / 4)
    assert describe_calibration(empty_bins())["draft_calibration_error"] is None
