"""The generation that the report shows."""

import json
from dataclasses import replace

import pytest
from evals_data import CONFIG, make_model, model_config

from pipeline.decoding import generate
from pipeline.decoding.text import token_texts
from pipeline.evals.decode_speed import write_example


@pytest.fixture(scope="module")
def model(data):
    return make_model(model_config(data.tokenizer))


def example(data, model, config, path) -> dict:
    write_example(model, data.tokenizer, data.heldout, config, 9, path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("block_size", [None, 2])
def test_example_is_a_sampled_generation_of_the_first_prompt(data, model, tmp_path, block_size):
    config = replace(CONFIG, block_size=block_size)
    found = example(data, model, config, tmp_path / "evals" / "example.json")
    prompt = data.heldout.prompts(1, CONFIG.prompt_tokens, 0)[0]
    expected = generate(
        model, prompt, block_size=block_size, max_new_tokens=26, temperature=1.0, seed=CONFIG.seed
    )
    assert found["prompt"] == data.tokenizer.decode(prompt)
    assert found["block_size"] == (block_size or model.config.block_size)
    assert found["tokens_per_forward"] == expected.tokens_per_forward
    assert [token["forward"] for token in found["tokens"]] == expected.forward_of_token
    text = "".join(token["text"] for token in found["tokens"])
    assert text == data.tokenizer.decode(expected.tokens)
    assert (found["step"], found["method"], found["temperature"]) == (9, "tidar", 1.0)


def test_example_stops_at_the_models_last_position(data, model, tmp_path):
    config = replace(CONFIG, max_new_tokens=100)
    found = example(data, model, config, tmp_path / "evals" / "example.json")
    assert len(found["tokens"]) == model.config.max_positions - CONFIG.prompt_tokens


def test_texts_of_tokens_join_and_wait_for_whole_characters(data):
    text = "naïve 木漏れ日 🙂\n"
    ids = data.tokenizer.encode(text)
    texts = token_texts(data.tokenizer, ids)
    assert len(texts) == len(ids) > len(text) - 5
    assert "".join(texts) == text
    assert not any("\ufffd" in part for part in texts)
    half = token_texts(data.tokenizer, ids[:-2])  # ends inside the last sign
    assert "".join(half) == data.tokenizer.decode(ids[:-2])
