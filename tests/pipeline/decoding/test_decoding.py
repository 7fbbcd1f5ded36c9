"""Decoding: greedy equality, exact cache, independent rows, limits, and clear errors."""

import pytest
import torch
from decoding_models import CPU, MASK, VOCABULARY, make_model, random_prompts
from small_models import sentencepiece_tokenizer

from pipeline.decoding import DecodeOptions, Sampling, batch, generate, generate_batch, stream
from pipeline.decoding.cache import KVCache
from pipeline.decoding.engine import StepEngine
from pipeline.decoding.generation import finish_each, open_engine
from pipeline.decoding.step import StepShape, prefill_mask
from pipeline.decoding.text import StopStrings
from pipeline.model.inference import DecodingForward
from pipeline.model.transformer import Transformer
from tidar_common.errors import UserError


@pytest.fixture(scope="module")
def model() -> Transformer:
    return make_model()


def test_a_prompt_is_taken_when_a_row_is_free_for_it(model):
    prompts, taken = random_prompts(3, (3, 7, 5) * 6, VOCABULARY), []

    def one_by_one():
        for prompt in prompts:
            taken.append(len(taken))
            yield prompt

    engine, _ = open_engine(model, [prompts[1]] * 3, DecodeOptions(batch_size=3, max_new_tokens=9))
    found = {}
    for number, run in finish_each(engine, one_by_one(), DecodeOptions(max_new_tokens=9, eos_id=2)):
        found[number] = run.tokens
        assert len(taken) < len(found) + 3
    alone = generate_batch(model, prompts, DecodeOptions(max_new_tokens=9, eos_id=2))
    assert [found[number] for number in range(len(prompts))] == [run.tokens for run in alone]


def test_a_forward_s_seconds_are_those_that_it_took(model, monkeypatch):
    """By a clock that only forwards move: one each, the prompt's pieces and the last step too."""
    hidden, passed = DecodingForward.hidden, [0]

    def counted(*arguments, **options):
        passed[0] += 1
        return hidden(*arguments, **options)

    monkeypatch.setattr(DecodingForward, "hidden", counted)
    monkeypatch.setattr(batch, "clock", lambda device: float(passed[0]))
    options = DecodeOptions(max_new_tokens=9, prefill_chunk=3)
    (run,) = generate_batch(model, random_prompts(3, (7,), VOCABULARY), options)
    assert run.forwards == passed[0] > 3
    assert (run.prefill_seconds, run.seconds) == (3.0, float(run.forwards))
    assert [seconds for _, seconds in run.steps] == [1.0] * (run.forwards - 3)


@pytest.mark.parametrize("block_size", range(1, 17))
def test_greedy_tidar_equals_greedy_ar(block_size):
    """Also with an untied, random head, where hardly any draft is accepted; 256 prompts in all."""
    for tied in (True, False):
        model = make_model(block_size, vocabulary=40, tie_embeddings=tied)
        prompts = random_prompts(block_size, (1, 2, 3, 5, 9, 14, 17, 30), 40)
        expected = generate_batch(
            model, prompts, DecodeOptions(batch_size=6, method="ar", max_new_tokens=24)
        )
        for blocks, batch_size in ((None, 1), ([], 1), ([block_size], 1), ([1], 4), (None, 4)):
            got = generate_batch(
                model,
                prompts,
                DecodeOptions(
                    block_size=block_size,
                    blocks=blocks,
                    max_new_tokens=24,
                    prefill_chunk=7,
                    batch_size=batch_size,
                ),
            )
            assert [run.tokens for run in got] == [run.tokens for run in expected]
            for run in got:
                assert sum(run.accepted) >= 23
                assert all(1 <= accepted <= block_size for accepted in run.accepted)
        assert all(run.forwards == 24 for run in expected)


@torch.no_grad()
def accepted_by_full_forwards(model: Transformer, prompt: list[int], text: list[int]) -> list[int]:
    """Tokens that each greedy step makes final on the way through `text`, which is AR's: drafts
    come from a forward of all that stands before the step's first token, and a block behind it."""
    size, made, accepted = model.config.block_size, 1, []
    while made + size <= len(text):
        before = prompt + text[: made - 1]
        mask = prefill_mask(0, len(before), size, CPU, model.config.causal_slots)
        ids = torch.tensor([before + [MASK] * size])
        draft = model(ids, torch.arange(ids.shape[1]), mask)[0, len(before) + 1 :].argmax(-1)
        right = [a == b for a, b in zip(draft.tolist(), text[made:], strict=False)]
        accepted.append(1 + (right.index(False) if False in right else len(right)))
        made += accepted[-1]
    return accepted


@pytest.mark.parametrize("batch_size", [1, 3])
def test_slots_are_decoded_by_the_rule_of_the_model(batch_size):
    """Greedy TiDAR is greedy AR whatever is drafted, and drafts are those of the model's rule."""
    found = []
    for causal_slots in (False, True):
        model = make_model(2, vocabulary=40, causal_slots=causal_slots, tie_embeddings=False)
        prompts = random_prompts(5, (1, 5, 9, 14, 3, 20), VOCABULARY)
        options = {"max_new_tokens": 40, "batch_size": batch_size}
        expected = generate_batch(model, prompts, DecodeOptions(method="ar", **options))
        got = generate_batch(model, prompts, DecodeOptions(**options))
        for run, own, prompt in zip(got, expected, prompts, strict=True):
            assert run.tokens == own.tokens
            steps = accepted_by_full_forwards(model, prompt.tolist(), own.tokens)
            assert run.accepted[: len(steps)] == steps
            found.append(steps)
    half = len(found) // 2
    assert found[:half] != found[half:], "or the two rules could be confused"


def test_greedy_equality_holds_under_a_repetition_penalty():
    model = make_model(2, vocabulary=40)
    prompts = random_prompts(0, (3, 8, 11, 20), 40)
    options = {"sampling": Sampling(repetition_penalty=1.5), "max_new_tokens": 30}
    expected = generate_batch(model, prompts, DecodeOptions(method="ar", **options))
    plain = generate_batch(model, prompts, DecodeOptions(method="ar", max_new_tokens=30))
    assert [run.tokens for run in expected] != [run.tokens for run in plain]
    for batch_size in (1, 3):
        got = generate_batch(model, prompts, DecodeOptions(batch_size=batch_size, **options))
        assert [run.tokens for run in got] == [run.tokens for run in expected]


def test_some_drafts_are_accepted_and_save_forwards():
    """A model that repeats one token drafts perfectly: K tokens come out of every step."""
    model = make_model(scale=1.0, tie_embeddings=False)
    with torch.no_grad():
        model.model.norm.weight.zero_()  # equal logits; argmax is token 0 for all
    result = generate(model, [1, 2], block_size=4, max_new_tokens=21)
    assert result.accepted == [4] * 5
    assert result.forwards == 6
    assert result.forward_of_token == [0] + [step for step in range(1, 6) for _ in range(4)]
    assert (result.prefill_forwards, result.stopped_by) == (1, "length")
    # Without block 4, which it always needs, a plain step has to follow each full one.
    fewer = generate(model, [1, 2], block_size=4, blocks=[1], max_new_tokens=21)
    assert fewer.tokens == result.tokens
    assert fewer.accepted == [4, 1] * 4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_of_a_batch_do_not_influence_each_other(temperature):
    """Rows begin and end at different times, and others take their places."""
    model = make_model(1, vocabulary=40)
    prompts = random_prompts(3, (4, 19, 1, 11, 7, 26, 2), 40)
    sampling = Sampling(temperature=temperature, top_k=20, repetition_penalty=1.1)
    alone = [
        generate_batch(
            model, [prompt], DecodeOptions(sampling=sampling, max_new_tokens=5 * n + 1), seeds=[n]
        )[0]
        for n, prompt in enumerate(prompts)
    ]
    eos = alone[6].tokens[3]
    together = generate_batch(
        model,
        prompts,
        DecodeOptions(batch_size=3, sampling=sampling, max_new_tokens=31, eos_id=eos),
    )
    for run, own in zip(together, alone, strict=True):
        shared = min(len(run.tokens), len(own.tokens))
        assert run.tokens[:shared] == own.tokens[:shared]
        end = run.tokens.index(eos) + 1 if eos in run.tokens else 31
        assert len(run.tokens) == end
        assert run.stopped_by == ("eos" if eos in run.tokens else "length")
    assert len({len(run.tokens) for run in together}) > 1


def fresh_cache(model: Transformer, tokens: list[int]) -> KVCache:
    dtype = next(model.parameters()).dtype
    cache = KVCache(model.config, 128, dtype=dtype, device=CPU)
    model(torch.tensor([tokens]), cache=cache)
    cache.keep(len(tokens))
    return cache


@pytest.mark.parametrize("shape", [StepShape(1), StepShape.full(4), StepShape(4, 4, (1, 2))])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_the_cache_holds_what_plain_decoding_would(shape, batch_size, temperature, dtype, atol):
    """In fp64 to rounding far below any mistake; in fp32 keys and values are around 1 here."""
    model = make_model(scale=8.0 if dtype == torch.float64 else 2.0).to(dtype)
    prompts = random_prompts(0, (5, 9, 2)[:batch_size], VOCABULARY)
    sampling = Sampling(temperature=temperature, seed=2)
    engine = StepEngine(model, sampling, shape, batch_size=batch_size, capacity=60, prefill_chunk=4)
    texts = [prompt.tolist() for prompt in prompts]
    with torch.inference_mode():
        for row, prompt in enumerate(prompts):
            texts[row] += engine.admit(row, prompt, row)[0]
        for _ in range(8):
            for text, new in zip(texts, engine.step(), strict=True):
                text += new
            for row, text in enumerate(texts):
                kept = len(text) - 1  # the last token is not cached yet
                own = engine.cache.row(row)
                assert own.lengths == [kept]
                fresh = fresh_cache(model, text[:-1])
                for layer in range(model.config.num_layers):
                    for got, expected in zip(own.kept(layer), fresh.kept(layer), strict=True):
                        torch.testing.assert_close(got, expected, atol=atol, rtol=0)


def test_the_cache_says_when_it_is_full(model):
    cache = KVCache(model.config, 4, dtype=torch.float32, device=CPU)
    with pytest.raises(ValueError, match="holds 4 tokens, 5 are needed"):
        model(torch.tensor([[1, 2, 3, 4, 5]]), cache=cache)


@pytest.mark.parametrize("method", ["ar", "tidar"])
@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_a_prompt_in_pieces_gives_the_same_text(model, method, chunk):
    (prompt,) = random_prompts(5, (17,), VOCABULARY)
    whole = generate(model, prompt, method=method, max_new_tokens=12)
    pieces = generate(model, prompt, method=method, max_new_tokens=12, prefill_chunk=chunk)
    assert pieces.tokens == whole.tokens
    assert pieces.prefill_forwards == -(-17 // chunk)
    assert pieces.forwards == whole.forwards + pieces.prefill_forwards - 1
    assert pieces.forward_of_token[0] == pieces.prefill_forwards - 1
    steps = list(
        stream(model, prompt, DecodeOptions(method=method, max_new_tokens=12, prefill_chunk=chunk))
    )
    assert len(steps) == pieces.forwards
    assert [token for tokens in steps for token in tokens] == whole.tokens


def test_trust_below_one_follows_the_mixture(model):
    """Greedy with trust 0 takes the diffusion argmax, so it differs from AR; 1 does not."""
    prompt = [1, 2, 3]
    ar = generate(model, prompt, method="ar", max_new_tokens=24)
    outputs = {trust: generate(model, prompt, trust=trust, max_new_tokens=24) for trust in (0, 1)}
    assert outputs[1].tokens == ar.tokens
    assert outputs[0].tokens != ar.tokens
    assert outputs[0].accepted == [4] * len(outputs[0].accepted)  # it always agrees with itself


@pytest.mark.parametrize("method", ["ar", "tidar"])
def test_stops_after_eos_and_at_the_limit(model, method):
    long = generate(model, [1, 2], method=method, max_new_tokens=24)
    assert len(long.tokens) == len(long.forward_of_token) == 24
    for eos in set(long.tokens):
        first = long.tokens.index(eos)
        stopped = generate(model, [1, 2], method=method, max_new_tokens=24, eos_id=eos)
        assert stopped.tokens == long.tokens[: first + 1]
    for limit in range(1, 24):
        cut = generate(model, [1, 2], method=method, max_new_tokens=limit)
        assert cut.tokens == long.tokens[:limit]


@pytest.mark.parametrize("method", ["ar", "tidar"])
def test_stop_strings_end_the_text_where_they_first_occur(method):
    tokenizer = sentencepiece_tokenizer()
    model = make_model(3, vocabulary=330, mask_token_id=4)
    prompt = tokenizer.encode("def add(")
    long = generate(model, prompt, method=method, max_new_tokens=30)
    text = tokenizer.decode(prompt + long.tokens)[len(tokenizer.decode(prompt)) :]
    checked = 0
    for start in range(0, len(text) - 3, 4):
        string = text[start : start + 3]
        if "\ufffd" in string:
            continue
        stop = StopStrings(tokenizer, ("not in there at all", string))
        run = generate(model, prompt, method=method, max_new_tokens=30, stop=stop)
        assert run.stopped_by == "stop"
        assert run.text == text[: text.index(string)]
        assert run.tokens == long.tokens[: len(run.tokens)]
        decoded = tokenizer.decode(prompt + run.tokens)[len(tokenizer.decode(prompt)) :]
        before = tokenizer.decode(prompt + run.tokens[:-1])[len(tokenizer.decode(prompt)) :]
        assert string in decoded
        assert string not in before
        checked += 1
    assert checked > 3
    none = generate(
        model, prompt, method=method, max_new_tokens=30, stop=StopStrings(tokenizer, ("\u2603",))
    )
    assert (none.stopped_by, none.text) == ("length", text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_ids": []}, "prompt: is empty"),
        ({"prompt_ids": [VOCABULARY]}, "prompt: holds token 13"),
        ({"prompt_ids": [-1, 3]}, "prompt: holds token -1"),
        ({"prompt_ids": [1], "method": "beam"}, "known are tidar, recurrent, ar"),
        ({"prompt_ids": [1], "max_new_tokens": 0}, "max_new_tokens: must be at least 1"),
        ({"prompt_ids": [1], "max_new_tokens": 5000}, "exceed the model's 4096 positions"),
        ({"prompt_ids": [1], "block_size": 0}, "block_size: must be at least 1"),
        ({"prompt_ids": [1], "temperature": -1.0}, "temperature: must be 0"),
        ({"prompt_ids": [1], "trust": 1.5}, "trust: must be in"),
        ({"prompt_ids": [1], "prefill_chunk": 0}, "prefill_chunk: must be at least 1"),
        ({"prompt_ids": [1], "blocks": [0, 1]}, "blocks: must be numbers in 1 … 4, got"),
        ({"prompt_ids": [1], "blocks": [1, 5]}, "blocks: must be numbers in 1 … 4"),
        ({"prompt_ids": [1], "blocks": "some"}, "blocks: unknown value 'some'"),
        ({"prompt_ids": [1], "blocks": "auto", "trust": 0.5}, "blocks: trust below 1"),
        ({"prompt_ids": [1], "confidence": 0.0}, "confidence: must be above 0"),
        ({"prompt_ids": [1], "blocks": [1], "trust": 0.5}, "blocks: trust below 1"),
    ],
)
def test_bad_arguments_name_themselves(model, arguments, message):
    with pytest.raises(UserError, match=message):
        generate(model, **arguments)


def test_bad_batches_name_themselves(model):
    with pytest.raises(UserError, match="batch_size: must be at least 1"):
        generate_batch(model, [[1]], DecodeOptions(batch_size=0))
    with pytest.raises(UserError, match="blocks: a batch needs block 1"):
        generate_batch(make_model(), [[1], [2]], DecodeOptions(batch_size=2, blocks=[2]))
    with pytest.raises(UserError, match="method=block_diffusion decodes one prompt at a time"):
        generate_batch(
            make_model(), [[1], [2]], DecodeOptions(batch_size=2, method="block_diffusion")
        )
    with pytest.raises(UserError, match="stop: holds an empty string"):
        StopStrings(sentencepiece_tokenizer(), ("",))
    assert generate_batch(model, [], DecodeOptions()) == []


def test_a_model_without_mask_token_cannot_draft():
    model = make_model(mask_token_id=None, block_size=None)
    with pytest.raises(UserError, match="block_size: this model has none"):
        generate(model, [1])
    with pytest.raises(UserError, match="no mask token"):
        generate(model, [1], block_size=2)
    assert len(generate(model, [1], method="ar", max_new_tokens=3).tokens) == 3
