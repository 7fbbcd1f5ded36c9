"""The guard of AR quality: what it says, and a run from a base model that it watches."""

import json
import re

import pytest
from commands import train_small

from pipeline.training.guards.ar_guard import ArGuard, ArGuardConfig, read_base, write_base
from pipeline.training.moments import Event


def after(run_dir, loss: float, most_rise: float = 0.05) -> tuple[list[str], list[Event]]:
    """What is said of an eval, and which events it makes."""
    said: list[str] = []
    told: list[Event] = []
    guard = ArGuard(run_dir, ArGuardConfig(most_rise), said.append)
    guard.report = told.append
    guard.on_eval([{"step": 40, "ar_loss": loss}, {"step": 40, "ar_loss": loss}])
    return said, told


def test_it_says_nothing_without_a_base_model(tmp_path):
    assert read_base(tmp_path) is None
    assert after(tmp_path, 9.0) == ([], [])


def test_a_rise_is_an_event_only_beyond_the_limit(tmp_path):
    write_base(tmp_path, 2.0)
    within = "step 40: held-out AR loss 2.0400, base model 2.0000 (+0.0400)"
    assert after(tmp_path, 2.04) == ([within], [])
    assert after(tmp_path, 1.5)[1] == []
    said, (event,) = after(tmp_path, 2.06)
    assert len(said) == 1
    assert (event["event"], event["step"], event["base"]) == ("ar_guard", 40, 2.0)
    assert event["rise"] == pytest.approx(0.06)
    text = "rose by 0.0600 nats a token, more than ar_guard.most_rise=0.05; raise objective.alpha"
    assert text in event["message"]
    assert after(tmp_path, 2.06, most_rise=0.1)[1] == []


def test_a_limit_below_zero_is_refused():
    with pytest.raises(ValueError, match="most_rise must be 0 or more"):
        ArGuardConfig(-0.1)


def test_a_run_from_a_base_model_is_watched(data_dir, trained_run, tmp_path):
    """The base's loss is that of the last eval of the run that it comes from."""
    run_dir = tmp_path / "second"
    done = train_small(
        data_dir, run_dir, f"init_from={trained_run}", "steps=2", "checkpoint.every=2",
        "evals.decode_speed.every=0", "optimizer.learning_rate=0.5", "schedule.warmup_steps=0",
        "ar_guard.most_rise=0.0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    last = (trained_run / "evals" / "decode_speed.jsonl").read_text().splitlines()[-1]
    base = read_base(run_dir)
    assert base == pytest.approx(json.loads(last)["ar_loss"], rel=1e-6)
    assert re.search(rf"step 2: held-out AR loss \d.*base model {base:.4f}", done.stdout)
    assert "ar_guard at step 2: held-out AR loss rose" in done.stdout  # at that learning rate
    events = map(json.loads, (run_dir / "events.jsonl").read_text().splitlines())
    (event,) = [event for event in events if event["event"] == "ar_guard"]
    assert event["ar_loss"] == pytest.approx(base + event["rise"])
    assert event["rise"] > 0
    assert read_base(trained_run) is None  # it started from nothing
