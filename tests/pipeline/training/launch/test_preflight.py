"""The check before the first step: what it says, and that a run is the same with it."""

import json

import pytest
from commands import train_small

from pipeline.training.launch.preflight import find_problems, table
from pipeline.training.moments import CLOCK

QUICK = ("steps=3", "evals.decode_speed.every=0", "wandb.mode=disabled", "checkpoint.every=3")


def report(rank: int, **changes) -> dict:
    usual = {
        "rank": rank, "host": f"node{rank}", "clock": 100.0, "python": "3.11.9", "torch": "2.11.0",
        "deepspeed": "0.19.8", "cuda": "12.8", "device": "H100", "free memory GiB": 79.0,
        "free disk GiB": 1000.0, "manifest": "abc", "shard": "ok", "problems": [],
    }  # fmt: skip
    return {**usual, **changes}


def test_equal_hosts_pass():
    assert find_problems([report(rank) for rank in range(4)]) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"torch": "2.13.0"}, "rank 2 on node2 has torch 2.13.0, the others 2.11.0"),
        ({"manifest": "xyz"}, "rank 2 on node2 has manifest xyz, the others abc"),
        ({"clock": 160.0}, "the clock of node2 (rank 2) is +60.0 s from that of rank 0"),
        ({"problems": ["shard: torn"], "shard": "failed"}, "rank 2 on node2: shard: torn"),
    ],
)
def test_the_host_that_differs_is_named(changes, expected):
    reports = [report(rank) for rank in range(4)]
    reports[2].update(changes)
    (problem,) = find_problems(reports)
    assert problem.startswith(expected)
    assert "node2" in table(reports)


@pytest.mark.long
@pytest.mark.parametrize("choice", ["deepspeed=zero1", "deepspeed=zero2", "deepspeed=zero3"])
def test_a_run_is_bit_equal_with_and_without_it(data_dir, tmp_path, choice):
    losses = []
    for check in ("false", "true"):
        run_dir = tmp_path / check
        done = train_small(data_dir, run_dir, *QUICK, choice, f"preflight={check}", processes=2)
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        losses.append([{k: v for k, v in row.items() if k not in CLOCK} for row in rows])
    assert losses[0] == losses[1]
    assert "free disk GiB" in done.stdout
    assert "preflight: all-reduce of 4 MiB" in done.stdout


@pytest.mark.long
def test_two_deterministic_runs_are_bit_equal(data_dir, tmp_path):
    """And so says the tool that compares runs."""
    from pipeline.report.compare import compare

    for name in ("a", "b"):
        done = train_small(data_dir, tmp_path / name, *QUICK, "deterministic=true", processes=2)
        assert done.returncode == 0, done.stderr
        assert "deterministic: no backend had to be given up" in done.stdout
    assert compare(tmp_path / "a", tmp_path / "b", "loss").equal
