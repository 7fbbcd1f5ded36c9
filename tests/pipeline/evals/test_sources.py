"""Drafts and losses by source: of each set of a mix what an eval of that set alone gives."""

import json
from dataclasses import replace

import pytest
from evals_data import BLOCK_SIZE, CONFIG, OneRank, make_model, model_config, write_data

from data_prep.formats.manifest import Manifest
from pipeline.data.mix import MixedSet
from pipeline.evals.acceptance import score_drafts
from pipeline.evals.config import LikelihoodConfig
from pipeline.evals.decode_speed import evaluate_decode_speed
from pipeline.evals.heldout import HeldOut
from pipeline.evals.likelihood import evaluate_likelihood, read_texts
from tidar_common.errors import UserError

DRAFTS = (
    "teacher_forced_acceptance", "teacher_forced_survival", "expected_tokens_per_forward",
    "recurrent_acceptance", "recurrent_expected_tokens_per_forward",
    "unigram_acceptance", "unigram_expected_tokens_per_forward",
    "bigram_acceptance", "bigram_expected_tokens_per_forward",
)  # fmt: skip
TEXT = ("ar_loss", "diffusion_loss", "unigram_loss", "unigram_entropy", *DRAFTS)
CALIBRATION = ("draft_calibration", "draft_calibration_error")


@pytest.fixture(scope="module")
def model(data):
    return make_model(model_config(data.tokenizer), scale=3.0)


@pytest.fixture(scope="module")
def sets(data, tmp_path_factory) -> dict[str, HeldOut]:
    """`data` itself, and other documents of the same corpus in its tokens."""
    own = data.folder / "tokenizer.model"
    folder = tmp_path_factory.mktemp("other")
    other = write_data(folder, "seed=5", f"tokenizer.path={own}").output_dir
    return {"own": data.heldout, "other": HeldOut(other, Manifest.load(other))}


@pytest.fixture(scope="module")
def mixed(data, sets) -> HeldOut:
    mix = [MixedSet(name, one._data_dir, one.manifest, ((0, 1.0),)) for name, one in sets.items()]
    return HeldOut(data.folder, data.manifest, mix)


def test_every_set_is_scored_as_it_is_alone(model, sets, mixed):
    config = replace(CONFIG, prompts=1, repeats=1, score_sequences=3)
    rows = evaluate_decode_speed(model, mixed, config, OneRank(), 7)
    for name, one in sets.items():
        alone = evaluate_decode_speed(model, one, config, OneRank(), 7)
        for row, own in zip(rows, alone, strict=True):
            assert own["by_source"] is None
            assert list(row["by_source"]) == sorted(sets)
            expected = {key: own[key] for key in (*TEXT, *CALIBRATION)}
            assert row["by_source"][name] == expected
    first, second = rows[0]["by_source"].values()
    assert first["ar_loss"] != second["ar_loss"], "or the sets could be confused"


def test_likelihood_of_every_set(data, model, sets, mixed):
    config = LikelihoodConfig(sequences=2)
    found = evaluate_likelihood(model, data.tokenizer, mixed, config, OneRank())
    assert list(found["by_source"]) == sorted(sets)
    for name, one in sets.items():
        alone = evaluate_likelihood(model, data.tokenizer, one, config, OneRank())
        own = found["by_source"][name]
        assert own == {key: alone[key] for key in own}
        assert own["drafts"]["temperature_1"]["expected_tokens_per_forward"] > 1


def test_drafts_of_texts_are_those_of_their_sequences(data, model, tmp_path):
    rows = [
        {"text": "the quick brown fox jumps over lazy dogs", "source": "prose"},
        {"text": "def return self\n" * 30, "source": "code"},
    ]
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    config = LikelihoodConfig(texts_file=str(path), sequences=1)
    found = evaluate_likelihood(model, data.tokenizer, data.heldout, config, OneRank())
    longest = data.manifest.sequence_length
    controls = data.heldout.controls(OneRank())
    for source, chosen in read_texts(path, data.tokenizer, longest, BLOCK_SIZE).items():
        scores = score_drafts(model, chosen, BLOCK_SIZE, controls)
        own = found["by_source"][source]["drafts"]
        for row, temperature in enumerate(("temperature_0", "temperature_1")):
            kept = (scores.survived["model"][row] / scores.drafts).tolist()
            assert own[temperature]["teacher_forced_survival"] == pytest.approx(kept)
            accepted = (scores.accepted["model"][row] / scores.drafts).tolist()
            assert own[temperature]["teacher_forced_acceptance"] == pytest.approx(accepted)
            assert own[temperature]["expected_tokens_per_forward"] == pytest.approx(1 + sum(kept))
            assert tuple(own[temperature]) == DRAFTS
        assert own["draft_calibration"]["drafts"] == scores.calibration[0].tolist()


def test_a_source_with_the_name_of_a_set_is_refused(data, model, mixed, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "fox", "source": "other"}')
    config = LikelihoodConfig(texts_file=str(path), sequences=1)
    with pytest.raises(UserError, match=r"the source 'other' is also a set of data\.mix"):
        evaluate_likelihood(model, data.tokenizer, mixed, config, OneRank())


def test_a_twin_has_no_drafts(data, mixed):
    twin = make_model(model_config(data.tokenizer).without_drafting())
    config = LikelihoodConfig(sequences=1)
    found = evaluate_likelihood(twin, data.tokenizer, mixed, config, OneRank())
    assert found["drafts"] is None
    assert [own["drafts"] for own in found["by_source"].values()] == [None, None]
