"""Twenty kills of one run, and what else `bench/reliability.py` counts, as it is committed."""

import json
import sys
from subprocess import run

import pytest
from commands import ROOT


@pytest.mark.long
def test_twenty_kills_and_three_signals_on_two_ranks(tmp_path):
    """Takes some ten minutes; `bench/results/reliability-cpu.json` is its output."""
    command = [sys.executable, "-m", "bench.reliability", "--parameters-m", "3"]
    done = run([*command, "--results", str(tmp_path)], cwd=ROOT, text=True, capture_output=True,
               timeout=3000, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    check(json.loads((tmp_path / "reliability-cpu.json").read_text()))


def test_the_committed_run_survived_all():
    check(json.loads((ROOT / "bench" / "results" / "reliability-cpu.json").read_text()))


def check(result: dict) -> None:
    assert result["options"]["processes"] == 2
    figures = result["figures"]
    assert figures["kills survived"] == 20
    assert min(figures["kills by place"].values()) >= 3
    assert len(figures["kills by place"]) == 6
    assert figures["bit-equal to the run left alone"]
    assert figures["eval rows equal"]
    assert figures["saved at the last step"] == [True] * 3
    assert figures["bit-equal after signals"]
    assert figures["damaged files refused"] == figures["damaged files tried"] > 20
    assert figures["bad inputs refused"] == figures["bad inputs tried"] > 5
    assert not figures["acted"]
