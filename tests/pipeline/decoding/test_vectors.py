"""The vectors that `docs/decoding.md` offers to other decoders hold for this one."""

import json
from pathlib import Path

import pytest
import torch

from pipeline import load_model
from pipeline.decoding import DecodeOptions, generate, generate_batch
from pipeline.decoding.sampling import verify

FOLDER = Path(__file__).parents[2] / "data" / "decoding"
VECTORS = json.loads((FOLDER / "vectors.json").read_text())


@pytest.fixture(scope="module")
def exported():
    return load_model(FOLDER / "model", device="cpu")


@pytest.mark.parametrize("number", range(len(VECTORS["greedy"])))
def test_greedy(exported, number):
    model, tokenizer = exported
    case = VECTORS["greedy"][number]
    assert tokenizer.encode(case["prompt"]) == case["prompt_ids"]
    assert tokenizer.decode(case["tokens"]) == case["text"]
    plain = generate(model, case["prompt_ids"], method="ar", max_new_tokens=40)
    assert plain.tokens == case["tokens"]
    for step in case["steps"]:
        run = generate(
            model,
            case["prompt_ids"],
            block_size=step["block_size"],
            blocks=step["blocks"],
            max_new_tokens=40,
        )
        assert run.tokens == case["tokens"]
        assert (run.forwards, run.accepted) == (step["forwards"], step["accepted"])


def test_a_trained_model_drafts_and_a_batch_changes_nothing(exported):
    model, _ = exported
    cases = VECTORS["greedy"]
    prompts = [case["prompt_ids"] for case in cases]
    runs = generate_batch(model, prompts, DecodeOptions(batch_size=3, max_new_tokens=40))
    assert [run.tokens for run in runs] == [case["tokens"] for case in cases]
    assert [run.accepted for run in runs] == [case["steps"][0]["accepted"] for case in cases]
    assert max(run.tokens_per_forward for run in runs) > 3


@pytest.mark.parametrize("number", range(len(VECTORS["verify"])))
def test_verify(number):
    case = VECTORS["verify"][number]
    accepted, token = verify(
        torch.tensor([case["drafts"]]),
        torch.tensor([case["draft_probabilities"]]),
        torch.tensor([case["target"]]),
        torch.tensor([case["uniform"]], dtype=torch.float64),
    )
    assert (int(accepted), int(token)) == (case["accepted"], case["token"])


def test_the_vectors_stay_small_and_clear_of_ties():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 1_000_000
    assert min(case["smallest_lead"] for case in VECTORS["greedy"]) > 1e-3
    assert {case["accepted"] for case in VECTORS["verify"]} == {0, 1, 2}
