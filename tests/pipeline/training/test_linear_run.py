"""`tidar-train` with one block for all counts, from the layout to the rows of its eval."""

import json
import math

from commands import train_small

from pipeline import load_model
from pipeline.decoding import generate

LINEAR = ("layout.linear=true", "layout.shift=true", "layout.coverage=0.6", "model.draft_rank=4",
          "wandb.mode=disabled", "steps=6", "checkpoint.every=6",
          "evals.decode_speed.score_sequences=40")  # fmt: skip


def test_a_linear_run_learns_and_is_scored_and_decodes_by_its_one_block(data_dir, tmp_path):
    done = train_small(data_dir, tmp_path, *LINEAR)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss_ar", "loss_diffusion", "loss_alone"):
        assert all(math.isfinite(row[name]) for row in rows)
        assert rows[-1][name] < rows[0][name]
    evals = (tmp_path / "evals" / "decode_speed.jsonl").read_text().splitlines()
    ours = [row for row in map(json.loads, evals) if row["method"] == "tidar"]
    assert {row["queries_per_forward"] for row in ours} == {4 + 7}
    assert {tuple(row["blocks"]) for row in ours} == {(1,)}
    for row in ours:
        stale = row["expected_tokens_by_staleness"]
        assert list(stale) == ["0", "1", "2"]
        assert stale["0"] == row["expected_tokens_per_forward"]
        assert all(1 <= tokens <= 4 for tokens in stale.values())
        if row["temperature"] == 0:
            assert row["exact_match_ar"] == 1
        else:  # every distribution has some overlap, and no two the same
            assert len({1.0, *stale.values()}) == 4
    model, _ = load_model(tmp_path)
    assert model.config.linear_drafts
    run = generate(model, [5, 6, 7], max_new_tokens=20)
    assert run.tokens == generate(model, [5, 6, 7], method="ar", max_new_tokens=20).tokens
    assert {queries for queries, _ in run.steps} == {4 + 7}
