"""Spikes in real runs: skipped, or gone back from, on all ranks alike and the same every time."""

import json
import shutil
from pathlib import Path

import pytest
from commands import SMALL_RUN, run

from pipeline.data.order import TrainState, numbers_after
from pipeline.distributed import World
from pipeline.report.compare import CLOCK
from pipeline.training.guards.anomalies import (
    LEFT_OUT,
    Anomalies,
    AnomalyConfig,
    LeftOut,
    LeftOutFile,
    merged,
)
from tidar_common.errors import UserError

SPIKING = (
    "steps=26", "checkpoint.every=6", "checkpoint.keep_last=0", "evals.decode_speed.every=0",
    "wandb.mode=disabled", "anomalies.spike_score=20", "deepspeed=zero2",
)  # fmt: skip
SPIKE = {"TIDAR_TEST_FAULT": "spike:43"}
"""Of two ranks with two micro-batches a step: the first of step 22, sequences 168 to 175."""
HARMLESS = {"TIDAR_TEST_FAULT": "spike:100000"}


def rows(run_dir: Path, name: str = "metrics.jsonl") -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / name).read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in lines]


def events(run_dir: Path, kind: str) -> list[dict]:
    return [row for row in rows(run_dir, "events.jsonl") if row["event"] == kind]


def spike(data_dir: Path, run_dir: Path, choice: str, environment: dict[str, str]) -> None:
    values = (f"data.dir={data_dir}", f"run_dir={run_dir}", *SMALL_RUN, *SPIKING)
    done = run("tests.faulty_train", *values, f"anomalies.on_spike={choice}", processes=2,
               **environment)  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def spiked(data_dir, tmp_path_factory) -> Path:
    """A run that went back from its spike."""
    run_dir = tmp_path_factory.mktemp("spikes") / "spiked"
    spike(data_dir, run_dir, "rollback", SPIKE)
    return run_dir


def test_a_run_goes_back_and_on_without_the_sequences_of_a_spike(data_dir, spiked, tmp_path):
    """It equals a run that never met them, line by line."""
    (event,) = events(spiked, "rolled_back")
    assert (event["step"], event["to_step"], event["quantity"]) == (22, 18, "loss")
    assert (event["first_sequence"], event["last_sequence"]) == (168, 175)
    assert event["score"] > 20
    shutil.copy(spiked / LEFT_OUT, tmp_path)
    spike(data_dir, tmp_path, "rollback", HARMLESS)
    assert rows(spiked) == rows(tmp_path)
    assert [row["step"] for row in rows(spiked)] == list(range(1, 27))
    seen = [row["sequences_seen"] for row in rows(spiked)]
    assert seen[20:23] == [168, 184, 192]  # the step after 168 takes 176 to 183


@pytest.mark.long
def test_a_rollback_survives_the_loss_of_everything_after_it(data_dir, spiked, tmp_path):
    """Only the record in the run directory is left: the checkpoint is older, the window as well."""
    lost = tmp_path / "lost"
    shutil.copytree(spiked, lost)
    for step in (24, 26):
        shutil.rmtree(lost / "checkpoints" / f"step-{step:08d}")
    spike(data_dir, lost, "rollback", HARMLESS)
    assert rows(lost) == rows(spiked)
    saved = json.loads((lost / "checkpoints" / "step-00000024" / "state.json").read_text())
    assert saved["left_out"] == [[168, 176]]
    assert len(saved["anomalies"]["recent"]["loss"]) == 24


@pytest.mark.long
def test_a_spike_is_skipped_by_choice_also_after_a_restart(data_dir, tmp_path):
    """The restart at step 18 has seen no value itself: the window comes with the checkpoint."""
    spike(data_dir, tmp_path, "skip", HARMLESS)
    for step in (24, 26):
        shutil.rmtree(tmp_path / "checkpoints" / f"step-{step:08d}")
    before = rows(tmp_path)
    spike(data_dir, tmp_path, "skip", {"TIDAR_TEST_FAULT": "spike:7"})  # again of step 22
    (event,) = events(tmp_path, "step_skipped")
    assert (event["step"], event["quantity"]) == (22, "loss")
    assert (event["first_sequence"], event["last_sequence"]) == (168, 175)
    after = rows(tmp_path)
    assert [row["step"] for row in after] == [n for n in range(1, 27) if n != 22]
    assert after[:21] == before[:21]
    assert after[-1]["data_digest"] == before[-1]["data_digest"]  # its data count as seen


def test_numbers_that_are_left_out_never_come_and_all_others_keep_their_order():
    ranges = [(3, 5), (9, 10), (40, 41)]
    kept = [n for n in range(60) if not any(first <= n < end for first, end in ranges)]
    for position in range(45):
        for count in (1, 4, 8):
            expected = [n for n in kept if n >= position][:count]
            assert numbers_after(position, count, ranges) == expected
    state = TrainState(left_out=ranges)
    for number in range(4):
        state.consume([bytes(32)] * 4)
        assert state.sequences_seen == kept[4 * number + 3] + 1
    assert TrainState.from_dict(json.loads(json.dumps(state.to_dict()))) == state


def test_ranges_are_merged():
    assert merged([(5, 9), (1, 3), (3, 4), (6, 7), (9, 12)]) == [(1, 4), (5, 12)]


def test_the_window_survives_a_checkpoint():
    config = AnomalyConfig(spike_score=8, on_spike="skip", spike_window=16)
    first, second = Anomalies(config), Anomalies(config)
    for step in range(40):
        first.spikes(loss=3.0 + 0.01 * (step % 7), grad_norm=1.0 + 0.1 * (step % 3))
    first.skipped()
    second.load(json.loads(json.dumps(first.to_dict())))
    assert second.to_dict() == first.to_dict()
    for name, value in (("loss", 3.05), ("loss", 3.9), ("grad_norm", 9.0)):
        assert second.score(name, value) == first.score(name, value)
        assert second.refuses(name, value) == (value in (3.9, 9.0))
    assert not Anomalies(AnomalyConfig(spike_score=8)).may_refuse


@pytest.mark.parametrize("values", [{"on_spike": "hide"}, {"on_spike": "skip"}])
def test_what_to_do_about_spikes_is_checked(values):
    with pytest.raises(ValueError, match="on_spike"):
        AnomalyConfig(**values)


class OneRank(World):
    """A world without processes."""

    def __init__(self) -> None:
        super().__init__(0, 1, None, None)

    def from_main(self, value):
        return value


def test_the_record_of_what_is_left_out_is_read_again_or_refused(tmp_path):
    record = LeftOutFile(tmp_path, OneRank())
    for to_step in (18, 18, 24):
        entry = LeftOut(168, 175, 22, to_step, "loss", 9.5, 31.0)
        assert record.add(entry) is None
    again = LeftOutFile(tmp_path, OneRank())
    assert again.entries == record.entries
    assert again.rollbacks_to(18) == 2
    assert again.ranges([(0, 8)]) == [(0, 8), (168, 176)]
    (tmp_path / LEFT_OUT).write_text('[{"first": 1}]')
    with pytest.raises(UserError, match=r"left_out.json: is damaged"):
        LeftOutFile(tmp_path, OneRank())
