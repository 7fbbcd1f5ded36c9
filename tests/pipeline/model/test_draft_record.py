"""What evals measured of the drafts goes with the weights: from a run's rows, and through JSON."""

import json

import pytest

from pipeline.model.draft_record import Acceptance, DraftRecord, record_of_run
from tidar_common import jsonlines
from tidar_common.run_files import DECODE_SPEED


def row(step, temperature, block, alone=None):
    return {
        "step": step, "method": "tidar", "temperature": temperature,
        "teacher_forced_acceptance": block, "recurrent_acceptance": alone,
    }  # fmt: skip


def run_with(tmp_path, rows):
    path = tmp_path / DECODE_SPEED
    path.parent.mkdir()
    jsonlines.append(path, rows)
    return tmp_path


def test_a_checkpoint_takes_the_last_evals_up_to_its_step(tmp_path):
    run = run_with(
        tmp_path,
        [row(10, 0.0, [0.5, 0.4], [0.3, 0.2]), row(10, 1.0, [0.6, 0.5]), row(10, 0.7, None),
         row(20, 0.0, [0.7, 0.6], [0.5, 0.4]), row(20, 1.0, [0.8, None])],
    )  # fmt: skip
    early = record_of_run(run, 10)
    assert early == DraftRecord(
        greedy=Acceptance((0.5, 0.4), (0.3, 0.2)), sampled=Acceptance((0.6, 0.5))
    )
    # Positions that no text reached say nothing, so the eval before stays.
    late = record_of_run(run, 25)
    assert late is not None
    assert late.at(greedy=True) == Acceptance((0.7, 0.6), (0.5, 0.4))
    assert late.at(greedy=False) == early.sampled
    assert record_of_run(run, 9) is None
    assert record_of_run(tmp_path / "elsewhere", 25) is None


def test_a_record_goes_through_json_unchanged():
    record = DraftRecord(greedy=Acceptance((0.5,), (0.25,)), sampled=Acceptance((0.75,)))
    assert DraftRecord.from_plain(json.loads(json.dumps(record.plain()))) == record
    assert DraftRecord.from_plain(DraftRecord().plain()) == DraftRecord()


@pytest.mark.parametrize(
    "values",
    [{"gready": {"block": [0.5]}}, {"greedy": {"block": [1.5]}}, {"greedy": {"block": ["x"]}},
     {"greedy": {}}, {"greedy": [0.5]}, [0.5]],
)  # fmt: skip
def test_what_is_no_record_is_refused(values):
    with pytest.raises((ValueError, TypeError, AttributeError)):
        DraftRecord.from_plain(values)
