"""Drafts in order: what a step leaves in hand, and greedy text that does not depend on it."""

import pytest
import torch
from decoding_models import MASK, make_model, random_prompts

from pipeline.decoding import DecodeOptions, Sampling, generate, generate_batch
from pipeline.decoding.engine import StepEngine
from pipeline.decoding.step import StepShape, prefill_mask
from pipeline.model.draft_head import unit
from tidar_common.errors import UserError

SIZE = 4


def slow_draft(model, text: list[int], with_block: bool) -> list[int]:
    """d_1 … d_{K-1} behind `text`, which ends in d_0: one full forward, then place by place."""
    kept, head = len(text) - 1, model.draft_head
    ids = torch.tensor([[*text[:-1], *[MASK] * SIZE]])
    mask = prefill_mask(0, kept, SIZE, torch.device("cpu"))
    hidden = model.hidden(ids, torch.arange(kept + SIZE), mask)[0]
    row = unit(hidden[kept - 1])
    state, token, tokens = head.cell.first(row), text[-1], []
    for place in range(1, SIZE):
        h = hidden[kept + place] if with_block else head.no_slot
        under = hidden[kept + place] if with_block else head.plain(row)
        told = head.cell.token(unit(model.model.embed_tokens.weight[token]))
        z, state = head.cell.step(head.cell.slot(unit(h)) + told, state)
        token = int((model.lm_head(under) + head.up(z)).argmax())
        tokens.append(token)
    return tokens


@pytest.mark.parametrize("cell", ["linear", "mlp", "gru"])
@pytest.mark.parametrize("blocks", [(1, 2, 3, 4), (2, 3), ()])
@pytest.mark.parametrize("batch_size", [1, 3])
@torch.inference_mode()
def test_the_draft_in_hand_is_that_of_the_formulas(cell, blocks, batch_size):
    """Behind every step: by the block of the number accepted, or without slots where it is not."""
    model = make_model(2, vocabulary=40, draft_rank=6, draft_cell=cell, draft_width=12).double()
    prompts = random_prompts(1, (5, 9, 2)[:batch_size], 40)
    shape = StepShape(SIZE, SIZE, blocks)
    engine = StepEngine(model, Sampling(), shape, batch_size=batch_size, capacity=80)
    texts = [prompt.tolist() for prompt in prompts]
    drafted_without = 0
    for row, prompt in enumerate(prompts):
        texts[row] += engine.admit(row, prompt, row)[0]
        expected = slow_draft(model, texts[row], with_block=bool(blocks))
        assert engine.state.drafts[row].tolist() == expected
    for _ in range(12):
        for row, new in enumerate(engine.step()):
            texts[row] += new
            expected = slow_draft(model, texts[row], with_block=len(new) in blocks)
            drafted_without += len(new) not in blocks
            assert engine.state.drafts[row].tolist() == expected
            assert engine._drafted[row], "a head leaves no row without a draft"
    assert drafted_without > 0 or len(blocks) == SIZE


def slow_linear_draft(model, text: list[int], new: int) -> list[int]:
    """d_1 … d_{K-1} behind `text`, which ends in d_0, by slots that know nothing of the `new`
    tokens before it: one full forward, then place by place."""
    kept, head = len(text) - 1, model.draft_head
    seen, slots = kept - new, 2 * SIZE - 1
    ids = torch.tensor([[*text[:seen], *[MASK] * slots]])
    mask = prefill_mask(0, seen, slots, torch.device("cpu"), model.config.causal_slots)
    hidden = model.hidden(ids, torch.arange(seen + slots), mask)[0, seen:]
    state = head.cell.first(unit(model.hidden(torch.tensor([text[:-1]]))[0, -1]))
    token, tokens = text[-1], []
    for place in range(1, SIZE):
        h = hidden[new + place]
        told = head.cell.token(unit(model.model.embed_tokens.weight[token]))
        z, state = head.cell.step(head.cell.slot(unit(h)) + told, state)
        token = int((model.lm_head(h) + head.up(z)).argmax())
        tokens.append(token)
    return tokens


def draft_with(model, text: list[int], right: int) -> torch.Tensor:
    """The greedy continuation of `text`, wrong behind its first `right` tokens."""
    tokens: list[int] = []
    for _ in range(SIZE - 1):
        tokens.append(int(model(torch.tensor([text + tokens]))[0, -1].argmax()))
    return torch.tensor([(token + (n >= right)) % 40 for n, token in enumerate(tokens)])


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("causal", [False, True])
@torch.inference_mode()
def test_one_block_drafts_behind_any_count(batch_size, causal):
    """The draft begins at the slot that stands at the new d_0, however stale it is."""
    model = make_model(
        2, vocabulary=40, draft_rank=6, draft_width=12, linear_drafts=True, causal_slots=causal
    ).double()
    prompts = random_prompts(1, (5, 9, 2)[:batch_size], 40)
    shape = StepShape.one_block(SIZE)
    engine = StepEngine(model, Sampling(), shape, batch_size=batch_size, capacity=80)
    texts = [prompt.tolist() for prompt in prompts]
    for row, prompt in enumerate(prompts):
        texts[row] += engine.admit(row, prompt, row)[0]
        assert engine.state.drafts[row].tolist() == slow_linear_draft(model, texts[row], 0)
    for step in range(10):
        right = [(step + row) % SIZE for row in range(batch_size)]
        for row, text in enumerate(texts):  # drafts of which so many are right
            engine.state.drafts[row] = draft_with(model, text, right[row])
        for row, new in enumerate(engine.step()):
            assert len(new) == right[row] + 1
            texts[row] += new
            # The block stood behind the old d_0, and saw it.
            expected = slow_linear_draft(model, texts[row], right[row])
            assert engine.state.drafts[row].tolist() == expected
            assert engine._drafted[row]


@pytest.mark.parametrize("block_size", [1, 2, 5, 8])
@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_greedy_text_is_that_of_plain_decoding(block_size, penalty):
    model = make_model(block_size, vocabulary=40, draft_rank=6, tie_embeddings=False)
    prompts = random_prompts(block_size, (1, 2, 9, 17, 30), 40)
    options = {"sampling": Sampling(repetition_penalty=penalty), "max_new_tokens": 24}
    expected = generate_batch(model, prompts, DecodeOptions(batch_size=5, method="ar", **options))
    for method, blocks, batch_size in (
        ("tidar", None, 1), ("tidar", [], 3), ("tidar", [block_size], 2), ("recurrent", None, 1),
        ("recurrent", None, 4),
    ):  # fmt: skip
        drafting = DecodeOptions(
            method=method, block_size=block_size, blocks=blocks, prefill_chunk=7,
            batch_size=batch_size, **options,
        )  # fmt: skip
        got = generate_batch(model, prompts, drafting)
        assert [run.tokens for run in got] == [run.tokens for run in expected]


@pytest.mark.parametrize("block_size", [1, 2, 6])
def test_greedy_text_of_linear_drafts_is_that_of_plain_decoding(block_size):
    model = make_model(block_size, vocabulary=40, draft_rank=6, linear_drafts=True)
    prompts = random_prompts(block_size, (1, 2, 9, 17), 40)
    options = {"sampling": Sampling(repetition_penalty=1.5), "max_new_tokens": 24}
    expected = generate_batch(model, prompts, DecodeOptions(batch_size=4, method="ar", **options))
    for method, blocks, batch_size in (
        ("tidar", None, 1), ("tidar", None, 3), ("tidar", [], 3), ("recurrent", None, 2)
    ):  # fmt: skip
        drafting = DecodeOptions(
            method=method, block_size=block_size, blocks=blocks, prefill_chunk=7,
            batch_size=batch_size, **options,
        )  # fmt: skip
        got = generate_batch(model, prompts, drafting)
        assert [run.tokens for run in got] == [run.tokens for run in expected]
        slots = 2 * block_size - 1 if (method, blocks) == ("tidar", None) else 0
        assert {queries for run in got for queries, _ in run.steps} == {block_size + slots}


def test_a_linear_step_is_with_its_block_or_without():
    model = make_model(draft_rank=6, linear_drafts=True)
    with pytest.raises(UserError, match=r"blocks: this model has one block .* got \[1, 2\]; leave"):
        generate(model, [1], blocks=[1, 2])
    with pytest.raises(UserError, match=r"blocks: trust below 1 reads the logits of the block"):
        generate(model, [1], blocks=[], trust=0.5)


def test_no_step_is_spent_on_a_missing_block():
    """Without a head every second step is a short one; with one each step verifies a full draft."""
    plain = make_model(3, vocabulary=40)
    headed = make_model(3, vocabulary=40, draft_rank=6)
    for model, drafts in ((plain, {0, SIZE - 1}), (headed, {SIZE - 1})):
        run = generate(model, [1, 2, 3], block_size=SIZE, blocks=[], max_new_tokens=30)
        assert set(run.drafts) == drafts
    run = generate(headed, [1, 2, 3], method="recurrent", max_new_tokens=30)
    assert {queries for queries, _ in run.steps} == {SIZE}, "K rows, and no mask slot"


def test_tables_of_tokens_change_nothing(monkeypatch):
    model = make_model(4, vocabulary=40, draft_rank=6)
    sampling = Sampling(temperature=1.0, seed=3)
    texts = []
    for elements in (0, 2**24):
        monkeypatch.setattr("pipeline.decoding.drafting.TABLE_ELEMENTS", elements)
        texts.append(
            generate_batch(model, [[1, 2]], DecodeOptions(sampling=sampling, max_new_tokens=40))[0]
        )
    assert texts[0].tokens == texts[1].tokens
    assert texts[0].accepted == texts[1].accepted


def test_recurrent_drafts_need_a_head():
    with pytest.raises(UserError, match="method: recurrent needs a model with a draft head"):
        generate(make_model(), [1], method="recurrent")
