"""The decode-speed eval: what its rows say, on one rank and on two."""

import json
from dataclasses import replace

import pytest
import torch
from evals_data import (
    BLOCK_SIZE,
    CONFIG,
    FEW,
    OneRank,
    make_flat_model,
    make_model,
    model_config,
)
from small_models import huggingface_tokenizer, write_checkpoint

from pipeline.decoding import generate
from pipeline.decoding.generation import finish_each
from pipeline.decoding.latency import LatencyCurve
from pipeline.evals import decoding_runs
from pipeline.evals.acceptance import score_drafts
from pipeline.evals.decode_speed import evaluate_decode_speed
from pipeline.evals.decoding_runs import divergence_gap
from pipeline.evals.run import comparison_table
from tidar_common.errors import UserError

CLOCK = (
    "tokens_per_second", "speedup_over_ar", "conversion", "tokens_per_second_range",
    "speedup_over_ar_range", "seconds_per_decoding_forward", "seconds_by_queries",
)  # fmt: skip


def rows_of(model, data, config=CONFIG, step: int | None = 7) -> dict:
    rows = evaluate_decode_speed(model, data.heldout, config, OneRank(), step)
    assert all(row["step"] == step for row in rows)
    return {(row["method"], row["temperature"]): row for row in rows}


@pytest.fixture(scope="module")
def model(data):
    return make_model(model_config(data.tokenizer))


def flat(row: dict) -> dict:
    """Lists spread over several keys, so that numbers can be compared with a tolerance."""
    spread = {}
    for key, value in row.items():
        if isinstance(value, list):
            spread |= {f"{key} {n}": v for n, v in enumerate(value)}
        elif isinstance(value, dict) and key not in CLOCK:
            spread |= {f"{key}.{name}": v for name, v in flat(value).items()}
        else:
            spread[key] = value
    return spread


def test_two_ranks_say_what_one_says(data, model, two_ranks):
    """Sampled rows too: a prompt has its own seed, whoever decodes it."""
    for config, got in zip((CONFIG, FEW), two_ranks["decode_speed"], strict=True):
        expected = evaluate_decode_speed(model, data.heldout, config, OneRank(), 7)
        for row, wanted in zip(map(flat, got), map(flat, expected), strict=True):
            assert row.keys() == wanted.keys()
            for key in row.keys() - set(CLOCK):
                assert row[key] == (pytest.approx(wanted[key]) if wanted[key] else wanted[key]), key


def test_rows_are_those_of_single_generations(data, model):
    rows = rows_of(model, data)
    prompts = data.heldout.prompts(5, 4, seed=0)
    for temperature in CONFIG.temperatures:
        for method in ("ar", "tidar"):
            runs = [
                generate(
                    model, prompt, method=method, max_new_tokens=13, temperature=temperature, seed=n
                )
                for n, prompt in enumerate(prompts)
            ]
            row = rows[method, temperature]
            assert row["prompts"] == 5
            assert row["tokens"] == sum(len(run.tokens) for run in runs) == 65
            assert row["forwards"] == sum(run.forwards for run in runs)
            assert row["tokens_per_forward"] == row["tokens"] / row["forwards"]
            if method == "tidar":
                steps = [a for run in runs for a in run.accepted]
                first = sum(a > 1 for a in steps) / len(steps)
                assert row["acceptance_by_position"][0] == first
                assert len(row["acceptance_by_position"]) == BLOCK_SIZE - 1
    assert rows["tidar", 0.0]["exact_match_ar"] == 1.0
    assert rows["tidar", 1.0]["exact_match_ar"] is None
    assert rows["ar", 0.0]["tokens_per_forward"] == rows["ar", 1.0]["tokens_per_forward"] == 1.0
    assert rows["ar", 1.0]["speedup_over_ar"] == 1.0
    assert rows["ar", 0.0]["acceptance_by_position"] is None


def test_scores_stand_in_every_row_and_acceptance_where_it_is_defined(data, model):
    rows = rows_of(model, data)
    losses = [
        (row["ar_loss"], row["diffusion_loss"], row["unigram_entropy"]) for row in rows.values()
    ]
    assert len(set(losses)) == 1
    greedy, sampled = rows["tidar", 0.0], rows["tidar", 1.0]
    assert greedy["teacher_forced_acceptance"] != sampled["teacher_forced_acceptance"]
    assert len(greedy["unigram_acceptance"]) == BLOCK_SIZE - 1
    assert rows["tidar", 0.5]["teacher_forced_acceptance"] is None
    assert rows["tidar", 0.5]["unigram_acceptance"] is None
    bins = greedy["draft_calibration"]
    assert all(len(values) == 10 for values in bins.values())
    pairs = zip(bins["drafts"], bins["verified"], strict=True)
    verified = sum(count * share for count, share in pairs if count)
    accepted = greedy["teacher_forced_acceptance"]
    assert min(accepted) <= verified / sum(bins["drafts"]) <= max(accepted)


def test_scores_are_taken_on_shifted_grids(data, model):
    """The decoder starts its blocks anywhere; a grid from the document's start scores otherwise."""
    controls = data.heldout.controls(OneRank())
    aligned, shifted = (
        score_drafts(model, data.heldout.sequences(5, 0, 4, shift=shift), 4, controls)
        for shift in (False, True)
    )
    row = rows_of(model, data)["tidar", 1.0]
    expected = shifted.diffusion_loss / shifted.diffusion_tokens
    assert row["diffusion_loss"] == pytest.approx(expected)
    assert row["diffusion_loss"] != pytest.approx(aligned.diffusion_loss / aligned.diffusion_tokens)
    keys = {"model": "teacher_forced", "unigram": "unigram", "bigram": "bigram"}
    assert shifted.accepted.keys() == keys.keys()
    for draft, key in keys.items():
        rates = (shifted.accepted[draft][1] / shifted.drafts).tolist()
        assert row[f"{key}_acceptance"] == pytest.approx(rates)
        if draft != "model":
            kept = (shifted.survived[draft][1] / shifted.drafts).sum()
            assert row[f"{key}_expected_tokens_per_forward"] == pytest.approx(1 + float(kept))


def test_a_model_that_drafts_perfectly_gives_k_tokens_a_forward(data):
    """One token from the first forward, then K from each: 13 = 1 + 3 · 4.

    It also repeats one token when greedy, which distinct 4-grams betray, and not when sampled.
    """
    rows = rows_of(make_flat_model(model_config(data.tokenizer)), data)
    for temperature in CONFIG.temperatures:
        row = rows["tidar", temperature]
        assert row["forwards"] == 5 * (1 + 3)
        assert row["tokens_per_forward"] == 13 / 4
        assert row["acceptance_by_position"] == [1.0] * (BLOCK_SIZE - 1)
    assert rows["tidar", 0.0]["distinct_4grams"] == 1 / 10
    assert rows["tidar", 1.0]["distinct_4grams"] == 1.0
    assert rows["tidar", 0.0]["teacher_forced_acceptance"] == [1.0] * (BLOCK_SIZE - 1)
    assert rows["tidar", 1.0]["teacher_forced_acceptance"] == pytest.approx([1.0] * 3)
    assert rows["tidar", 1.0]["teacher_forced_survival"] == pytest.approx([1.0] * 3)
    assert rows["tidar", 0.0]["expected_tokens_per_forward"] == BLOCK_SIZE


def test_a_twin_gives_only_ar_rows(data):
    twin = make_model(model_config(data.tokenizer).without_drafting())
    rows = rows_of(twin, data)
    assert set(rows) == {("ar", temperature) for temperature in CONFIG.temperatures}
    for row in rows.values():
        assert row["diffusion_loss"] is None
        assert row["teacher_forced_acceptance"] is None
        assert row["expected_tokens_per_forward"] is None
        assert row["block_size"] == 1
        assert row["ar_loss"] > 0


def test_block_size_may_differ_from_the_trained_one(data, model):
    rows = rows_of(model, data, replace(CONFIG, block_size=2, temperatures=[0.0]))
    assert rows["tidar", 0.0]["block_size"] == 2
    assert len(rows["tidar", 0.0]["acceptance_by_position"]) == 1
    assert rows["tidar", 0.0]["exact_match_ar"] == 1.0


def test_methods_take_turns_and_warm_up_is_not_counted(data, model, monkeypatch):
    calls = []

    def spy(engine, prompts, options, **seeds):
        calls.append((options.method, options.sampling.temperature, options.max_new_tokens))
        return finish_each(engine, prompts, options, **seeds)

    monkeypatch.setattr(decoding_runs, "finish_each", spy)
    rows_of(model, data, replace(CONFIG, prompts=2, temperatures=[0.0, 1.0], repeats=2))
    warm_up = [("ar", 0.0, 8), ("tidar", 0.0, 8), ("ar", 1.0, 8), ("tidar", 1.0, 8)]
    first = [("ar", 0.0, 13), ("tidar", 0.0, 13), ("ar", 1.0, 13), ("tidar", 1.0, 13)]
    second = [("tidar", 0.0, 13), ("ar", 0.0, 13), ("tidar", 1.0, 13), ("ar", 1.0, 13)]
    assert calls == warm_up + 2 * (first + second)


def test_speeds_are_medians_over_repeats_with_their_range(data, model, monkeypatch):
    seconds = iter([1.0] * 2 + [2.0, 4.0, 3.0, 9.0, 5.0, 6.0])  # warm-up, then ar, tidar in turn

    def timed(*arguments, **seeds):
        ((number, run),) = finish_each(*arguments, **seeds)
        run.seconds, run.prefill_seconds = next(seconds), 0.5
        return [(number, run)]

    monkeypatch.setattr(decoding_runs, "finish_each", timed)
    rows = rows_of(model, data, replace(CONFIG, prompts=1, temperatures=[0.0], repeats=3))
    ar, tidar = rows["ar", 0.0], rows["tidar", 0.0]
    assert ar["tokens_per_second"] == 13 / 3
    assert ar["tokens_per_second_range"] == {"min": 13 / 5, "max": 13 / 2}
    assert ar["seconds_per_decoding_forward"] == 2.5 / 12
    assert tidar["tokens_per_second"] == 13 / 6
    assert tidar["speedup_over_ar"] == pytest.approx(0.5)
    assert tidar["speedup_over_ar_range"] == pytest.approx({"min": 1 / 3, "max": 5 / 6})
    assert tidar["conversion"] == pytest.approx(0.5 / tidar["tokens_per_forward"])
    assert tidar["queries_per_forward"] == BLOCK_SIZE + BLOCK_SIZE**2
    assert list(ar["seconds_by_queries"]) == ["1"]
    assert list(tidar["seconds_by_queries"]) == [str(BLOCK_SIZE + BLOCK_SIZE**2)]
    assert tidar["seconds_by_queries"][str(BLOCK_SIZE + BLOCK_SIZE**2)] > 0
    decoding = 12 / (tidar["forwards"] - 1)
    assert tidar["tokens_per_decoding_forward"] == decoding
    assert tidar["peak_memory_bytes"] is None
    table = comparison_table([ar, tidar]).markdown().splitlines()
    assert [line.count("|") for line in table] == [9] * 4
    assert table[3].startswith("| TiDAR | 0 | 4 |")
    assert "| 0.50× (0.33 to 0.83) |" in table[3]
    assert table[3].endswith("| 100 % of 1 |")


def test_prompt_lookup_stands_beside_them(data, model):
    methods = ["tidar", "ar", "prompt_lookup"]
    rows = rows_of(model, data, replace(CONFIG, methods=methods, temperatures=[0.0], repeats=1))
    assert set(rows) == {("ar", 0.0), ("tidar", 0.0), ("prompt_lookup", 0.0)}
    lookup = rows["prompt_lookup", 0.0]
    assert lookup["exact_match_ar"] == 1.0
    assert (lookup["block_size"], len(lookup["acceptance_by_position"])) == (8, 7)
    assert lookup["divergences"] == 0


def test_every_method_stands_in_one_table(data, model, tmp_path):
    """The draft model is the model itself, so that all its drafts are accepted when greedy."""
    draft = write_checkpoint(tmp_path / "draft", model, data.tokenizer)
    methods = ["ar", "tidar", "block_diffusion", "prompt_lookup", "speculative"]
    config = replace(
        CONFIG, methods=methods, repeats=1, draft_checkpoint=str(draft), confidence=0.2, blocks=[2],
    )  # fmt: skip
    rows = rows_of(model, data, config)
    assert [method for method, t in rows if t == 0] == methods
    prompts = data.heldout.prompts(5, 4, seed=0)
    for temperature in config.temperatures:
        diffusion = rows["block_diffusion", temperature]
        runs = [
            generate(
                model, prompt, method="block_diffusion", confidence=0.2, max_new_tokens=13,
                temperature=temperature, seed=n,
            )
            for n, prompt in enumerate(prompts)
        ]  # fmt: skip
        assert diffusion["forwards"] == sum(run.forwards for run in runs)
        assert diffusion["acceptance_by_position"] is None
        assert (diffusion["block_size"], diffusion["blocks"]) == (BLOCK_SIZE, None)
        first = sum(run.prefill_tokens for run in runs)
        decoding = sum(run.forwards - 1 for run in runs)
        assert diffusion["tokens_per_decoding_forward"] == pytest.approx((65 - first) / decoding)
        assert rows["tidar", temperature]["blocks"] == [2]
    speculative = rows["speculative", 0.0]
    assert speculative["exact_match_ar"] == 1.0
    assert speculative["acceptance_by_position"] == pytest.approx([1.0] * 7)
    assert rows["block_diffusion", 0.0]["exact_match_ar"] < 1.0  # lossy, and said so
    table = comparison_table(list(rows.values())).markdown()
    assert "| block diffusion (not lossless) | 0 | 4 |" in table


def test_a_draft_checkpoint_of_another_tokenizer_is_refused(data, model, tmp_path):
    draft = write_checkpoint(tmp_path / "draft", model, huggingface_tokenizer())
    config = replace(CONFIG, methods=["ar", "speculative"], draft_checkpoint=str(draft))
    with pytest.raises(UserError, match=r"draft_checkpoint: .* another tokenizer"):
        rows_of(model, data, config)


@pytest.mark.parametrize(("per_query", "blocks"), [(1e-3, [BLOCK_SIZE]), (9.0, None)])
def test_the_chosen_step_follows_the_machine_and_leaves_the_text_alone(
    data, monkeypatch, per_query, blocks
):
    """A model that drafts perfectly only ever needs its last block."""
    times = (1.0, 1.0 + 99 * per_query)
    curve = LatencyCurve((1, 100), (10,), (times,), (1,), (0.0,), (0.0,))
    monkeypatch.setattr(decoding_runs, "latency_curve", lambda model: curve)
    config = replace(CONFIG, methods=["ar", "tidar", "tidar_chosen"], repeats=1)
    rows = rows_of(make_flat_model(model_config(data.tokenizer)), data, config)
    for temperature in config.temperatures:
        row = rows["tidar_chosen", temperature]
        assert row["blocks"] == blocks
        assert row["tokens_per_forward"] == (13 / 4 if blocks else 1.0)
    assert rows["tidar_chosen", 0.0]["exact_match_ar"] == 1.0


def test_prompts_from_a_file_are_counted_by_category(data, model, tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "def add(left", "category": "code"},
        {"prompt": "The rain in", "category": "prose"},
        {"prompt": "x = [1, 2", "category": "code"},
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    config = replace(CONFIG, prompts_file=str(path), temperatures=[0.0], repeats=1)
    row = rows_of(model, data, config)["tidar", 0.0]
    assert row["prompts"] == 3
    assert {name: found["prompts"] for name, found in row["categories"].items()} == {
        "code": 2,
        "prose": 1,
    }
    path.write_text('{"prompt": 3}\n')
    with pytest.raises(UserError, match=r'prompts.jsonl:1: "prompt" must be there, and be a text'):
        rows_of(model, data, config)


def test_a_difference_is_reported_with_its_gap(model):
    """AR's own token against any other: the gap is that of the causal logits there."""
    prompt = [5, 6, 7]
    ar = generate(model, prompt, method="ar", max_new_tokens=6).tokens
    assert divergence_gap(model, prompt, ar, ar) is None
    assert divergence_gap(model, prompt, ar, ar[:3]) is None
    other = [*ar[:4], ar[4] + 1, ar[5]]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ar[:4]]))[0, -1]
    gap = divergence_gap(model, prompt, ar, other)
    assert gap == pytest.approx(float(logits[ar[4]] - logits[ar[4] + 1]), abs=1e-5)
    assert gap > 0


def test_a_continuation_beyond_the_models_positions_is_refused(data, model):
    with pytest.raises(UserError, match="positions"):
        rows_of(model, data, replace(CONFIG, max_new_tokens=1000))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": 0}, "prompts must be at least 1"),
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"every": -1}, "every must be at least 0"),
        ({"temperatures": []}, "temperatures must be a list"),
        ({"temperatures": [0.0, -1.0]}, "temperatures must be a list"),
        ({"temperatures": [1.0, 1.0]}, "must differ"),
        ({"repeats": 0}, "repeats must be at least 1"),
        ({"methods": ["tidar"]}, "methods must have ar among them"),
        ({"methods": ["ar", "beam"]}, "methods must be different ones of ar, tidar, tidar_chosen"),
        ({"prompts_file": "/nowhere"}, "prompts_file: /nowhere is not a file"),
        ({"confidence": 0.0}, "confidence must be above 0"),
        ({"methods": ["ar", "speculative"]}, "draft_checkpoint and the method speculative need"),
        ({"draft_checkpoint": "/"}, "draft_checkpoint and the method speculative need"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)


def test_evaluating_leaves_the_model_and_the_random_state_alone(data, model):
    before = {name: p.clone() for name, p in model.named_parameters()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    rows_of(model, data)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
