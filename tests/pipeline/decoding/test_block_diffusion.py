"""Block diffusion decoding against an oracle that keeps no cache and writes the rule out."""

import pytest
import torch
from decoding_models import CPU, MASK, VOCABULARY, make_model, random_prompts

from pipeline.decoding import DecodeOptions, Sampling, generate, generate_batch
from pipeline.decoding.block_diffusion import BlockDiffusionEngine
from pipeline.decoding.cache import KVCache
from pipeline.decoding.generation import finish_each, stream
from pipeline.decoding.step import StepShape, prefill_mask
from tidar_common.errors import UserError


@torch.no_grad()
def oracle(model, prompt: list[int], size: int, confidence: float, count: int, penalty=1.0):
    """Greedy text, and the forwards until it stood there; a full forward each time."""
    text, forwards = list(prompt), 0
    while len(text) - len(prompt) < count:
        block, still_open = [MASK] * size, [True] * size
        while any(still_open):
            ids = torch.tensor([text + block])
            mask = prefill_mask(0, len(text), size, CPU, model.config.causal_slots)
            logits = model(ids, torch.arange(ids.shape[1]), mask)[0, len(text) :].double()
            for token in {*text, *(t for t, o in zip(block, still_open, strict=True) if not o)}:
                column = logits[:, token]
                logits[:, token] = torch.where(column > 0, column / penalty, column * penalty)
            sure, tokens = torch.softmax(logits, -1).max(-1)
            sure[~torch.tensor(still_open)] = -1
            keep = {int(sure.argmax())} | {n for n in range(size) if sure[n] >= confidence}
            for place in keep:
                block[place], still_open[place] = int(tokens[place]), False
            forwards += 1
            closed = still_open.index(True) if True in still_open else size
            if len(text) - len(prompt) + closed >= count:
                return (text + block)[len(prompt) :][:count], forwards
        text += block
    raise AssertionError("the loop returns")


@pytest.mark.parametrize("size", [1, 2, 4, 7])
@pytest.mark.parametrize("confidence", [0.2, 0.6, 1.0])
@pytest.mark.parametrize(("penalty", "causal"), [(1.0, False), (1.5, False), (1.0, True)])
def test_greedy_text_and_forwards_are_those_of_the_oracle(size, confidence, penalty, causal):
    model = make_model(size, scale=4.0, causal_slots=causal)
    for prompt in random_prompts(size, (1, 6, 15), MASK):
        tokens, forwards = oracle(model, prompt.tolist(), size, confidence, 17, penalty)
        for chunk in (4, 512):
            run = generate(
                model, prompt, method="block_diffusion", block_size=size, confidence=confidence,
                max_new_tokens=17, prefill_chunk=chunk, repetition_penalty=penalty,
            )  # fmt: skip
            assert run.tokens == tokens
            assert run.forwards == forwards + -(-len(prompt) // chunk) - 1


def test_confidence_trades_forwards_for_the_text_of_one_slot_at_a_time():
    model = make_model(2, scale=4.0)
    prompt = [1, 2, 3]
    runs = {
        confidence: generate(
            model, prompt, method="block_diffusion", confidence=confidence, max_new_tokens=32
        )
        for confidence in (1e-6, 1.0)
    }
    assert runs[1e-6].forwards == 32 / 4
    # A probability may round to 1, so the highest threshold is no promise of one slot a forward.
    assert runs[1.0].forwards > 20
    ar = generate(model, prompt, method="ar", max_new_tokens=32)
    assert runs[1e-6].tokens != ar.tokens  # nothing verifies it


def test_drawn_tokens_follow_the_blocks_own_distribution():
    """With every slot kept at once, a block of two is two draws from the first forward's rows."""
    model, draws = make_model(seed=3, scale=3.0), 600
    ids = torch.tensor([[1, 7, 2, MASK, MASK]])
    with torch.no_grad():
        logits = model(ids, torch.arange(5), prefill_mask(0, 3, 2, CPU))[0, 3:]
    law = torch.softmax(logits.double(), -1)
    runs = generate_batch(
        model,
        [[1, 7, 2]] * draws,
        DecodeOptions(
            method="block_diffusion",
            block_size=2,
            confidence=1e-9,
            max_new_tokens=2,
            sampling=Sampling(temperature=1.0),
        ),
    )
    for place in range(2):
        seen = torch.bincount(torch.tensor([run.tokens[place] for run in runs]), minlength=13)
        spread = (law[place] * (1 - law[place]) / draws).sqrt()
        assert ((seen / draws - law[place]).abs() < 4.5 * spread + 1e-6).all()


def test_it_stops_and_streams_inside_a_block():
    model = make_model(1, scale=4.0)
    options = {"method": "block_diffusion", "block_size": 5}
    long = generate(model, [1, 2], max_new_tokens=30, **options)
    for eos in set(long.tokens):
        stopped = generate(model, [1, 2], max_new_tokens=30, eos_id=eos, **options)
        assert stopped.tokens == long.tokens[: long.tokens.index(eos) + 1]
    for limit in range(1, 12):
        cut = generate(model, [1, 2], max_new_tokens=limit, **options)
        assert cut.tokens == long.tokens[:limit]
    steps = list(stream(model, [1, 2], DecodeOptions(max_new_tokens=30, **options)))
    assert [token for tokens in steps for token in tokens] == long.tokens
    assert len(steps) == long.forwards
    assert (long.accepted, long.drafts) == ([], [])


def test_steps_of_fixed_width_give_the_same_tokens():
    """The way of captured steps, every step run as it is."""
    model, keys = make_model(1, scale=4.0), []
    prompts = random_prompts(0, (3, 250, 9), VOCABULARY - 1)
    sampling = Sampling(temperature=1.0, repetition_penalty=1.2)
    options = {"capacity": 300, "confidence": 0.5}
    plain = BlockDiffusionEngine(model, sampling, StepShape.unmasking(4), **options)
    static = BlockDiffusionEngine(model, sampling, StepShape.unmasking(4), **options)
    static.cache = KVCache(model.config, 312, dtype=torch.float32, device=CPU, ragged=True)

    def run_each(key, run):
        keys.append(key)
        return run()

    static._graphs = run_each
    expected = dict(finish_each(plain, prompts, DecodeOptions(max_new_tokens=40)))
    got = dict(finish_each(static, prompts, DecodeOptions(max_new_tokens=40)))
    assert [got[n].tokens for n in range(3)] == [expected[n].tokens for n in range(3)]
    assert {width for *_, width in keys} == {256, 312}


def test_it_needs_a_mask_token_and_no_trust():
    with pytest.raises(UserError, match="no mask token"):
        generate(make_model(mask_token_id=None), [1], method="block_diffusion")
    with pytest.raises(UserError, match="trust: below 1 needs method=tidar"):
        generate(make_model(), [1], method="block_diffusion", trust=0.5)
