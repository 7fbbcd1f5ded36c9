"""docs/results.md is what the files in bench/results say today, and its arithmetic is right."""

import json
import re
from pathlib import Path

from tools import results

ROOT = Path(__file__).resolve().parents[2]


def result(run: str, seed: int, ar_loss: float, expected: float | None) -> dict:
    """The parts of a result file that ratios and means are made of."""
    sampled = {"expected_tokens_per_forward": expected}
    own = {"ar_loss": ar_loss, "bits_per_byte": ar_loss / 2, "sampled": sampled, "block_size": 8}
    return {"run": run, "seed": seed, "about": run, "scores": [own]}


def test_the_page_is_current():
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert page == results.page(), "out of date; run python -m tools.results"
    assert "{{" not in page


def test_figures_are_those_of_the_files():
    """Every committed run of the first seed has a row with its own numbers."""
    _, recipes = results.page().split("### Every recipe")
    parts = dict(zip(("stdlib", "installed"), recipes.split("### On a larger"), strict=True))
    files = sorted((ROOT / "bench" / "results" / "experiments").glob("*-seed0.json"))
    assert files
    for path in files:
        page = parts[path.name.partition("-")[0]]
        content = json.loads(path.read_text(encoding="utf-8"))
        own = content["scores"][0]
        rows = [line for line in page.splitlines() if line.startswith(f"| `{content['run']}` |")]
        assert len(rows) == len(content["scores"])
        cells = re.split(r" *\| *", rows[0])
        assert f"{own['ar_loss']:.3f}" in cells
        assert f"{own['bits_per_byte']:.3f}" in cells
        expected = own["sampled"]["expected_tokens_per_forward"]
        assert expected is None or f"{expected:.3f}" in cells


def test_the_commands_in_the_files_name_no_place_of_one_machine():
    for path in (ROOT / "bench" / "results" / "experiments").glob("*.json"):
        commands = json.loads(path.read_text(encoding="utf-8"))["commands"]
        assert commands[0].startswith("tidar-train experiment=study data.dir=runs/")
        assert not any("=/" in command for command in commands)


def test_ratios_pair_runs_by_seed():
    found = {
        "published": {0: result("published", 0, 3.0, 1.5), 1: result("published", 1, 4.0, 1.6)},
        "ar_tokens": {1: result("ar_tokens", 1, 2.0, None), 2: result("ar_tokens", 2, 9.0, None)},
    }
    losses = results.figure("ar_loss")
    assert results.ratio(found, "published", "ar_tokens", losses) == [2.0]
    assert results.ratio(found, "published", "nothing", losses) == []
    expected = results.figure("expected_tokens_per_forward", "sampled")
    assert results.ratio(found, "published", "ar_tokens", expected) == []
    own = list(found["published"].values())
    assert results.spread(own, losses, ".2f") == "3.50 (3.00–4.00)"
    assert results.spread(own[:1], losses, ".2f") == "3.00"
    assert results.spread(found["ar_tokens"].values(), expected, ".2f") == "–"


def test_a_longer_run_is_compared_with_one_as_long(tmp_path):
    (tmp_path / "drafts").mkdir()
    expected = {"published": 1.5, "gru": 2.1, "published-x4": 1.6, "gru-x4": 3.2}
    for name, tokens in expected.items():
        content = result(name.partition("-")[0], 0, 3.0, tokens)
        content["scores"][0]["greedy"] = content["scores"][0]["sampled"]
        (tmp_path / "drafts" / f"stdlib-{name}-seed0.json").write_text(json.dumps(content))
    loaded = results.load(tmp_path, "stdlib", "drafts")
    assert loaded.keys() == expected.keys()
    rows = [line for line in results.drafts(loaded).splitlines() if line.startswith("| `")]
    assert [re.split(r" *\| *", row)[9] for row in rows] == [
        "1", "1.400 (one seed)", "1", "2.000 (one seed)"
    ]  # fmt: skip
    assert "4 times as long" in rows[3]


def test_runs_without_a_result_are_named():
    every = {
        run.name: {seed: {} for seed in (results.HEADLINE_SEEDS if run.headline else (0,))}
        for run in results.RUNS
    }
    assert results.missing(every) == "All runs are here."
    del every["published"][2], every["shift"]
    text = results.missing(every)
    assert text == "Not run yet, by seed: `shift` 0; `published` 2."


def test_a_verdict_says_what_was_reached():
    def small(value: float) -> bool:
        return value <= 1.01

    assert results.verdict([1.0, 1.005], small) == "reached"
    assert results.verdict([1.0, 1.015], small) == "reached on average"
    assert results.verdict([1.0, 1.5], small) == "missed"
    assert results.verdict([], small) == ""
