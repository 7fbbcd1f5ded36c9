"""This decoder and `export_reader`, which does what the page for another decoder's author says and
shares no code, both give what the vectors hold; whoever leaves a part out does not."""

import json
from pathlib import Path

import pytest
import torch
from export_reader import Decoder, Export, Settings

from pipeline.decoding import DecodeOptions, Sampling, generate
from pipeline.decoding.engine import StepEngine
from pipeline.model.loading import open_model, read_model

DATA = Path(__file__).parents[2] / "data"
FOLDER = DATA / "drafting"
VECTORS = {path.parent.name: json.loads(path.read_text()) for path in FOLDER.glob("*/vectors.json")}
CASES = [(name, number) for name, runs in VECTORS.items() for number in range(len(runs))]
OLD = json.loads((DATA / "decoding" / "vectors.json").read_text())["greedy"]


def reader(export: Export, run: dict) -> Decoder:
    size, blocks, numbers = run["block_size"], run["blocks"], run["numbers"]
    settings = Settings(**run["sampling"])
    return Decoder(export, settings, size, blocks, numbers["verify"], numbers["draft"])


def agrees(export: Export, run: dict) -> bool:
    decoder = reader(export, run)
    if decoder.start(run["prompt"]) != run["first"]:
        return False
    for step in run["steps"]:
        if decoder.draft != step["draft"] or not are_close(decoder.draft, decoder.q, step):
            return False
        if decoder.step() != step["made"]:
            return False
    return True


def are_close(draft: list[int], q, step: dict) -> bool:
    """Whether the tokens of a draft had the chances that the vectors say; true when greedy."""
    own = [float(row[token]) for token, row in zip(draft, q, strict=True)] if "q" in step else []
    return all(abs(x - y) < 3e-5 for x, y in zip(own, step.get("q", []), strict=True))


@pytest.fixture(scope="module")
def models():
    return {name: read_model(open_model(FOLDER / name), device="cpu") for name in VECTORS}


@pytest.mark.parametrize(("name", "number"), CASES)
@torch.inference_mode()
def test_this_decoder(models, name, number):
    model, run = models[name], VECTORS[name][number]
    sampling = Sampling(seed=run["seed"], **run["sampling"])
    options = DecodeOptions(sampling=sampling, block_size=run["block_size"], blocks=run["blocks"])
    tokens = [run["first"], *(token for step in run["steps"] for token in step["made"])]
    room = len(run["prompt"]) + len(tokens)
    engine = StepEngine(model, sampling, options.step_shape(model), capacity=room)
    assert engine.admit(0, torch.tensor(run["prompt"]), run["seed"])[0] == [run["first"]]
    for step in run["steps"]:
        assert engine.state.drafts[0].tolist() == step["draft"]
        if "q" in step:
            assert are_close(step["draft"], engine.state.probabilities[0], step)
        assert engine.step() == [step["made"]]
    for method in ("tidar", *(["recurrent"] if not run["blocks"] else [])):
        whole = generate(
            model, run["prompt"], method=method, block_size=run["block_size"],
            blocks=run["blocks"], max_new_tokens=len(tokens), seed=run["seed"], **run["sampling"],
        )  # fmt: skip
        assert whole.tokens == tokens
        assert whole.accepted == [len(step["made"]) for step in run["steps"]]


@pytest.mark.parametrize(("name", "number"), CASES)
def test_a_decoder_that_shares_no_code(name, number):
    run = VECTORS[name][number]
    assert agrees(Export(FOLDER / name), run)
    decoder = reader(Export(FOLDER / name), run)
    decoder.start(run["prompt"])
    for _ in run["steps"]:
        decoder.step()
    assert decoder.margin > 1e-5, "rounding could turn a decision"


@pytest.mark.parametrize("number", range(len(OLD)))
def test_it_reads_a_folder_without_a_head_as_well(number):
    """Version 1 of `tidar.json`; blocks that are missing cost a short step."""
    export, case = Export(DATA / "decoding" / "model"), OLD[number]
    for run in case["steps"]:
        decoder = Decoder(export, Settings(), run["block_size"], run["blocks"], [], [])
        tokens, accepted = [decoder.start(case["prompt_ids"])], []
        while len(tokens) < len(case["tokens"]):
            made = decoder.step()
            tokens += made
            accepted.append(len(made))
        assert tokens[: len(case["tokens"])] == case["tokens"]
        assert (1 + len(accepted), accepted) == (run["forwards"], run["accepted"])


class NoAdapters(Export):
    def projection(self, name, x, is_slot):
        return self.linear(name, x)


class AdaptersEverywhere(Export):
    def projection(self, name, x, is_slot):
        return super().projection(name, x, is_slot | True)


class MaskFromTheMatrix(Export):
    def __init__(self, folder):
        super().__init__(folder)
        self.drafting["own_mask_embedding"] = False


class SlotsInBothDirections(Export):
    def __init__(self, folder):
        super().__init__(folder)
        self.drafting["causal_slots"] = False


class FreshSlots(Export):
    """Takes the one block for one of K slots behind each count."""

    def __init__(self, folder):
        super().__init__(folder)
        self.drafting["linear_drafts"] = False


class Without(Export):
    """A tensor of the head is left out, or taken for another."""

    def __init__(self, folder, name, axis=None):
        super().__init__(folder)
        value = self.weights[f"draft_head.{name}"]
        self.weights[f"draft_head.{name}"] = 0 * value if axis is None else value[::-1]


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("gru", NoAdapters), ("gru", AdaptersEverywhere), ("gru", MaskFromTheMatrix),
        ("causal", SlotsInBothDirections), ("one_block", FreshSlots), ("one_block", NoAdapters),
        *(
            ("gru", lambda folder, tensor=tensor: Without(folder, tensor))
            for tensor in ("cell.start.weight", "cell.state.weight", "cell.token.weight",
                           "plain.weight", "no_slot", "up.weight")
        ),
        ("gru", lambda folder: Without(folder, "cell.slot.bias", 0)),
        ("causal", lambda folder: Without(folder, "cell.slot.weight")),
        ("one_block", lambda folder: Without(folder, "cell.down.weight")),
    ],
)  # fmt: skip
def test_the_vectors_catch_what_is_left_out(name, wrong):
    assert not all(agrees(wrong(FOLDER / name), run) for run in VECTORS[name])


def test_the_vectors_stay_small_and_cover_every_cell_and_family():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 100_000
    exports = [Export(FOLDER / name) for name in VECTORS]
    assert {e.drafting["draft_cell"] for e in exports} == {"linear", "mlp", "gru"}
    assert {e.config["model_type"] for e in exports} == {"qwen2", "qwen3", "llama"}
    made = [len(step["made"]) for runs in VECTORS.values() for run in runs for step in run["steps"]]
    assert {made.count(n) > 10 for n in (1, 2, 3, 4)} == {True}
