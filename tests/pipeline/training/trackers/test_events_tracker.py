"""Events: a line each in `events.jsonl`, an alert in W&B for those that somebody should know."""

import json

from pipeline.training.moments import Together, make_event
from pipeline.training.state import TrainState
from pipeline.training.trackers.metrics import EventsFile
from pipeline.training.trackers.wandb import Wandb, WandbConfig


class FakeRun:
    def __init__(self) -> None:
        self.alerts: list[str] = []
        self.logged: list[tuple[int, dict]] = []

    def alert(self, title: str, text: str) -> None:
        self.alerts.append(f"{title}: {text}")

    def log(self, values: dict, step: int) -> None:
        self.logged.append((step, values))


def test_events_are_written_and_alerted(tmp_path):
    said: list[str] = []
    wandb = Wandb(tmp_path, WandbConfig(), {}, said.append, [])
    wandb.run = FakeRun()
    both = Together([EventsFile(tmp_path), wandb])
    both.on_event(make_event("checkpoint_saved", 4, "step-00000004", held_s=0.5, name="x"))
    both.on_event(make_event("step_skipped", 5, "loss is not finite", first_sequence=32))
    rows = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [list(row)[:4] for row in rows] == [["time", "event", "step", "message"]] * 2
    assert [row["event"] for row in rows] == ["checkpoint_saved", "step_skipped"]
    assert wandb.run.alerts == [f"{tmp_path.name}: step skipped: loss is not finite"]
    assert wandb.run.logged == [
        (4, {"events/checkpoint_saved/held_s": 0.5}),
        (5, {"events/step_skipped/first_sequence": 32}),
    ]
    assert said == []


def test_a_resume_keeps_the_history(tmp_path):
    file = EventsFile(tmp_path)
    file.on_event(make_event("straggler", 50, "rank 1 is slow"))
    EventsFile(tmp_path).on_start(TrainState(step=10))
    assert file.path.read_text().count("\n") == 1
