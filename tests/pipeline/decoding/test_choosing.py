"""The step chosen while decoding: what it follows, and that the text does not."""

import pytest
import torch
from decoding_models import VOCABULARY, make_model, random_prompts
from test_sampling_exact import expected_pairs, p_value, pair_counts

from pipeline.decoding import (
    DecodeOptions,
    Sampling,
    choice,
    generate,
    generate_batch,
    generation,
    stream,
)
from pipeline.decoding.choice import PRIOR, ChoosingEngine
from pipeline.decoding.generation import finish_each, open_engine
from pipeline.decoding.latency import LatencyCurve
from pipeline.decoding.step import StepShape
from pipeline.model.draft_record import Acceptance, DraftRecord


def curve(per_query: float) -> LatencyCurve:
    return LatencyCurve((1, 100), (100,), ((1.0, 1.0 + 99 * per_query),), (1,), (0.0,), (0.0,))


def flat_model():
    """Says token 0 for ever, and drafts it."""
    model = make_model(scale=1.0, tie_embeddings=False)
    with torch.no_grad():
        model.model.norm.weight.zero_()
    return model


def engine_of(model, per_query: float, choices: list, **options) -> ChoosingEngine:
    return ChoosingEngine(
        model, options.pop("sampling", Sampling()), 4, curve(per_query), capacity=200,
        on_choice=choices.append, **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("per_query", "shape"),
    [(1e-6, StepShape.full(4)), (0.05, StepShape(4, 4, (4,))), (9.0, StepShape(1))],
)
def test_the_choice_follows_acceptance_and_curve(per_query, shape):
    """A model that drafts perfectly needs its last block only, or none where queries are dear.

    Sixteen steps do not prove that it always will, so where blocks cost nothing all are there.
    """
    choices: list = []
    engine = engine_of(flat_model(), per_query, choices)
    assert engine.shape.block_size == 4  # on trial in any case
    ((_, run),) = finish_each(engine, [torch.tensor([1, 2])], DecodeOptions(max_new_tokens=150))
    assert run.tokens == [0] * 150
    assert [choice.shape for choice in choices] == [shape]
    assert engine.shape == shape
    assert all(rate > 0.95 for rate in engine.acceptance().block)
    assert run.accepted[-2] == (4 if shape.drafting else 1)


def test_acceptance_counts_only_what_was_verified():
    choices: list = []
    engine = engine_of(make_model(tie_embeddings=False), 0.01, choices)
    assert engine.acceptance().block == pytest.approx([PRIOR] * 3)
    ((_, run),) = finish_each(engine, [torch.tensor([1, 2])], DecodeOptions(max_new_tokens=60))
    steps = [
        (final, drafts) for final, drafts in zip(run.accepted, run.drafts, strict=True) if drafts
    ]
    reached = sum(1 for _ in steps)
    accepted = sum(final > 1 for final, _ in steps)
    assert reached >= choice.TRIAL_STEPS
    first = engine.acceptance().block[0]
    assert first == pytest.approx((accepted + 2 * PRIOR) / (reached + 2))
    assert 0 in run.drafts  # the short steps in between say nothing about drafts


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("per_query", [1e-6, 0.05, 9.0])
@pytest.mark.parametrize(
    ("penalty", "changes"),
    [(1.0, {}), (1.3, {}), (1.3, {"draft_rank": 5}),
     (1.3, {"draft_rank": 5, "linear_drafts": True})],
)  # fmt: skip
def test_greedy_text_does_not_depend_on_the_choice(
    monkeypatch, batch_size, per_query, penalty, changes
):
    monkeypatch.setattr(generation, "latency_curve", lambda model: curve(per_query))
    model = make_model(1, vocabulary=40, **changes)
    prompts = random_prompts(2, (3, 8, 1, 20, 5), 40)
    options = {"max_new_tokens": 50, "sampling": Sampling(repetition_penalty=penalty)}
    expected = generate_batch(model, prompts, DecodeOptions(method="ar", **options))
    got = generate_batch(
        model, prompts, DecodeOptions(blocks="auto", batch_size=batch_size, **options)
    )
    assert [run.tokens for run in got] == [run.tokens for run in expected]


def test_a_head_is_tried_with_and_without_blocks():
    """Both kinds of acceptance are known before the choice, and each counts for itself."""
    choices: list = []
    model = flat_model_with_head()
    engine = engine_of(model, 1e-6, choices)
    tried = [(engine.shape.blocks, len(choices)) for _ in finish_steps(engine, 150)]
    trials = {blocks for blocks, chosen in tried if not chosen}
    assert () in trials
    assert any(trials - {()})
    found = engine.acceptance()
    assert all(rate > 0.9 for rate in found.block)
    assert all(rate < 0.2 for rate in found.alone[:1])
    assert [bool(choice.shape.blocks) for choice in choices] == [True]


def test_blocks_go_where_they_are_dear_and_the_head_does_without():
    choices: list = []
    engine = engine_of(flat_model_with_head(blind=False), 0.05, choices)
    list(finish_steps(engine, 150))
    (choice,) = choices
    assert choice.shape == StepShape(4, 4, (), sequential=True)
    assert choice.tokens_per_forward == pytest.approx(4, rel=0.1)


def flat_model_with_head(blind: bool = True):
    """Says token 0 for ever and drafts it; where it is blind, token 1 without slots."""
    model = make_model(scale=1.0, tie_embeddings=False, draft_rank=3, draft_cell="linear")
    head = model.draft_head
    with torch.no_grad():
        model.model.norm.weight.zero_()
        for parameter in head.parameters():
            parameter.zero_()
        if blind:  # the vector in place of slots makes z, and z makes token 1
            head.no_slot.fill_(1.0)
            head.cell.slot.weight.fill_(1.0)
            head.up.weight[1] = 1.0
    return model


def finish_steps(engine, tokens: int):
    """Decode one request, a step at a time."""
    engine.admit(0, torch.tensor([1, 2]), 0)
    made = 1
    while made < tokens:
        made += len(engine.step()[0])
        yield made


def test_drawn_text_keeps_its_distribution_across_the_change(monkeypatch):
    """The change comes after one step; pairs of the tokens around it."""
    monkeypatch.setattr(choice, "TRIAL_STEPS", 1)
    model, sampling, count = make_model(seed=3, scale=3.0), Sampling(temperature=1.0), 400
    texts = []
    for seed in range(count):
        engine = engine_of(model, 0.1, [], sampling=sampling)
        ((_, run),) = finish_each(
            engine, [torch.tensor([1, 7, 2])], DecodeOptions(max_new_tokens=3), seeds=[seed]
        )
        texts.append(run.tokens)
    drawn = torch.tensor(texts)
    observed = pair_counts(drawn[:, 1], drawn[:, 2])
    assert observed.shape == (VOCABULARY, VOCABULARY)
    assert p_value(observed, expected_pairs(model, sampling)) > 1e-3


def test_a_block_of_one_has_nothing_to_choose(monkeypatch):
    monkeypatch.setattr(generation, "latency_curve", lambda model: curve(1.0))
    choices: list = []
    engine, prompts = open_engine(
        make_model(),
        [[1, 2]],
        DecodeOptions(block_size=1, blocks="auto", max_new_tokens=30, on_choice=choices.append),
    )
    ((_, run),) = finish_each(engine, prompts, DecodeOptions(max_new_tokens=30))
    assert choices == []
    assert run.tokens == generate(make_model(), [1, 2], method="ar", max_new_tokens=30).tokens


def measured(rate: float) -> DraftRecord:
    return DraftRecord(greedy=Acceptance([rate] * 3), sampled=Acceptance([rate] * 3))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0)])
def test_measured_acceptance_needs_no_trial(sampling):
    choices: list = []
    model = flat_model()
    model.draft_record = measured(1.0)
    engine = engine_of(model, 0.05, choices, sampling=sampling)
    assert [choice.shape for choice in choices] == [StepShape(4, 4, (4,))]
    assert engine.shape == choices[0].shape


def test_a_record_that_speaks_against_drafts_is_put_to_the_test():
    """A text may be easier than those that were held out: one trial costs little."""
    choices: list = []
    model = flat_model()
    model.draft_record = measured(0.0)
    engine = engine_of(model, 0.05, choices)
    assert engine.shape.drafting
    assert not choices
    ((_, run),) = finish_each(engine, [torch.tensor([1, 2])], DecodeOptions(max_new_tokens=150))
    (chosen,) = choices
    assert chosen.tokens_per_forward < 2  # what was measured still counts beside the trial
    assert run.drafts.count(3) >= choice.TRIAL_STEPS
    assert run.tokens == [0] * 150


def test_a_record_of_a_shorter_block_stands_for_longer_ones():
    counts = choice.Counts.of(5, [0.9, 0.5])
    assert counts.rates() == pytest.approx([0.9, 0.5, 0.5, 0.5])


def test_a_head_without_measured_drafts_alone_is_tried():
    choices: list = []
    model = make_model(tie_embeddings=False, draft_rank=5)
    model.draft_record = measured(1.0)
    engine = engine_of(model, 0.05, choices)
    assert engine.shape.drafting
    assert not choices


def test_a_stream_measures_the_machine_before_its_first_forward(monkeypatch):
    """Or the first answer's tokens per second would count it."""
    asked: list = []
    monkeypatch.setattr(generation, "latency_curve", lambda model: asked.append(1) or curve(0.05))
    forwards = stream(flat_model(), [1, 2], DecodeOptions(max_new_tokens=8, blocks="auto"))
    assert asked == [1]
    assert [token for tokens in forwards for token in tokens] == [0] * 8
