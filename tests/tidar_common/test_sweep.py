"""A command line with several values is a list of runs, each in a folder of its own."""

import json

import pytest
from commands import SMALL_RUN, run

from tidar_common.errors import UserError
from tidar_common.sweep import expand, main


def test_one_value_each_is_one_run_as_it_was_written():
    overrides = ["steps=3", "run_dir=x", "wandb.tags=[a,b]"]
    assert expand(overrides) == [overrides]


def test_every_combination_has_its_folder():
    runs = expand(
        ["run_dir=runs/x", "objective.alpha=0.3,1", "steps=9", "model=choice(tiny,small)"]
    )
    assert len(runs) == 4
    assert runs[0] == [
        "steps=9", "objective.alpha=0.3", "model=tiny",
        "run_dir=runs/x/objective.alpha-0.3_model-tiny",
    ]  # fmt: skip
    assert len({run[-1] for run in runs}) == 4


@pytest.mark.parametrize(
    ("overrides", "said"),
    [(["steps=1,2"], "run_dir: has no value"), (["steps=1,2", "run_dir=[x"], "run_dir=\\[x: ")],
)
def test_what_cannot_be_swept_is_said(overrides, said):
    with pytest.raises(UserError, match=said):
        expand(overrides)


def test_an_array_task_gets_its_run(capsys):
    overrides = ["run_dir=r", "steps=range(1,4)"]
    assert main(["count", *overrides]) == 0
    assert main(["nth", "2", *overrides]) == 0
    assert capsys.readouterr().out == "3\nsteps=3\nrun_dir=r/steps-3\n"
    assert main(["nth", "3", *overrides]) == 2
    assert capsys.readouterr().err == "error: array task 3: there are 3 runs, from 0 on\n"


def test_training_goes_through_all_runs(data_dir, tmp_path):
    """The first cannot start; the second is trained all the same, and the first's code is left."""
    done = run(
        "pipeline.train", "-m", f"data.dir={data_dir}", *SMALL_RUN, f"run_dir={tmp_path}",
        "wandb.mode=disabled", "steps=2", "schedule.warmup_steps=0", "global_batch_size=3,4",
        "evals.decode_speed.prompts=1", "evals.decode_speed.max_new_tokens=4",
        "evals.decode_speed.score_sequences=2",
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "global_batch_size: 3 is not a multiple" in done.stderr
    rows = [
        json.loads(line) for line in (tmp_path / "global_batch_size-4" / "metrics.jsonl").open()
    ]
    assert [row["step"] for row in rows] == [1, 2]
    *_, head, first, second = done.stdout.splitlines()
    assert head.split()[:3] == ["run", "state", "step"]
    assert first.split()[:4] == ["global_batch_size-3", "no", "step", "yet"]
    assert set(first.split()[4:]) == {"–"}
    assert second.split()[:3] == ["global_batch_size-4", "finished", "2"]


def test_hydra_s_own_options_are_every_run_s():
    runs = expand(["--config-dir", "mine", "--config-name=x", "run_dir=r", "steps=1,2"])
    assert runs[1] == ["--config-dir", "mine", "--config-name=x", "steps=2", "run_dir=r/steps-2"]
