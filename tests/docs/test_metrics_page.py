"""`docs/evals.md` explains exactly the keys that are written."""

import json
from pathlib import Path

import pytest
from documented import documented

from pipeline.evals.run import SCHEMAS
from pipeline.training.trackers import StepMetrics


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_run_writes_what_is_explained(trained_run):
    for row in rows(trained_run / "metrics.jsonl"):
        assert list(row) == documented("`metrics.jsonl`") == list(StepMetrics.__dataclass_fields__)
    for row in rows(trained_run / "evals" / "decode_speed.jsonl"):
        assert list(row) == documented("`evals/decode_speed.jsonl`")
    example = json.loads((trained_run / "evals" / "example.json").read_text(encoding="utf-8"))
    assert list(example) == documented("`evals/example.json`")
    assert all(token.keys() == {"text", "forward"} for token in example["tokens"])


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_eval_has_its_place(name):
    assert name in documented("`tidar-evaluate` output")
