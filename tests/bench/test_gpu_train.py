"""`bench/gpu_train.sh` at a size for a CPU: pieces too short for the whole, resumed to the end."""

import json
import os
import subprocess
import sys

import pytest
from commands import ROOT, SMALL_MODEL

SAVED = 75
SETTINGS = {
    "PYTHON": sys.executable, "AR_STEPS": "6", "STEPS": "4", "DEVICE": "cpu", "EVAL_S": "0",
    "TRAIN_S": "20", "MARGIN_S": "2",
    "EXTRA": " ".join((
        *SMALL_MODEL, "precision=fp32", "global_batch_size=4", "micro_batch_size=4",
        "deepspeed=zero0", "layout.block_size=4", "evals.decode_speed.prompts=1",
        "evals.decode_speed.prompt_tokens=8", "evals.decode_speed.max_new_tokens=4",
        "evals.decode_speed.score_sequences=2",
    )),
    "EVAL_EXTRA": "evals.decode_speed.prompts=2 evals.decode_speed.prompt_tokens=8 "
                  "evals.decode_speed.max_new_tokens=8 evals.decode_speed.score_sequences=2",
}  # fmt: skip


def piece(folder, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ, **SETTINGS, "WORK": str(folder / "work"), "RESULTS": str(folder / "results"),
        "PYTHONPATH": str(ROOT), **settings,
    }  # fmt: skip
    return subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu_train.sh")],
        env=environment, text=True, capture_output=True, timeout=500,
    )  # fmt: skip


@pytest.mark.long
def test_pieces_add_up_to_the_whole(tmp_path, data_dir, monkeypatch):
    monkeypatch.setitem(SETTINGS, "DATA", str(data_dir))
    first = piece(tmp_path, BUDGET_S="1")
    assert first.returncode == SAVED, first.stderr
    assert "ar comes next" in first.stdout
    # Enough to begin, too little to end: the run is stopped, saved, and goes on.
    second = piece(tmp_path, BUDGET_S="40", AR_STEPS="100000")
    assert second.returncode == SAVED, second.stderr
    assert "the rest of ar comes next" in second.stdout
    done = (tmp_path / "work" / "ar" / "metrics.jsonl").read_text().count("\n")
    assert done > 6
    steps = str(done + 2)
    third = piece(tmp_path, AR_STEPS=steps)
    assert third.returncode == 0, third.stderr
    (path,) = (tmp_path / "results").iterdir()
    found = json.loads(path.read_text())
    assert path.name == "gpu_train-cpu.json"
    assert found["runs"]["ar"]["steps"] == done + 2
    assert found["runs"]["tidar"]["steps"] == found["runs"]["twin"]["steps"] == 4
    assert found["runs"]["tidar"]["data_digest"] == found["runs"]["twin"]["data_digest"]
    bits = {name: own["bits_per_byte"] for name, own in found["likelihood"].items()}
    assert found["bits_per_byte_over_twin"] == bits["tidar"] / bits["twin"]
    methods = {row["method"] for row in found["decode_speed"]}
    assert methods == {"ar", "tidar", "tidar_chosen"}
    again = piece(tmp_path, AR_STEPS=steps)
    assert again.returncode == 0, again.stderr
    assert "step " not in again.stdout
