"""`tidar-train` as its user runs it: files, learning, ZeRO stages, processes, resume, mistakes."""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from commands import ROOT, SMALL_RUN, command, train_small
from document_sets import prepare_documents

from pipeline.train import train
from pipeline.training.moments import CLOCK, StepMetrics
from tidar_common import cli

LONGER = ("steps=40", "checkpoint.every=5", "evals.decode_speed.every=0")
QUICK = ("steps=4", "evals.decode_speed.every=0", "wandb.mode=disabled")


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def exact(rows: list[dict]) -> list[dict]:
    """Rows without what the clock says."""
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]


def only_error(done: subprocess.CompletedProcess) -> str:
    """The one line on stderr of a command that refused its input."""
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("[20")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def test_a_run_leaves_everything_it_promises(trained_run):
    rows = metrics(trained_run)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert set(rows[0]) == set(StepMetrics.__dataclass_fields__)
    assert [row["sequences_seen"] for row in rows] == [8 * step for step in range(1, 13)]
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    for row in rows:
        joint = (row["loss_ar"] + row["loss_diffusion"]) / 2
        assert row["loss"] == pytest.approx(joint, rel=1e-6)
    names = sorted(path.name for path in (trained_run / "checkpoints").iterdir())
    assert names == ["latest", "step-00000008", "step-00000012"]
    assert (trained_run / "checkpoints" / "latest").read_text() == "step-00000012\n"
    evals = (trained_run / "evals" / "decode_speed.jsonl").read_text().splitlines()
    seen = {(row["step"], row["method"], row["temperature"]) for row in map(json.loads, evals)}
    assert seen == {(s, m, t) for s in (6, 12) for m in ("ar", "tidar") for t in (0.0, 1.0)}
    for row in map(json.loads, evals):
        assert row["prompts"] == 3
        if row["temperature"] == 0:
            assert row["exact_match_ar"] == 1.0
    assert "<html" in (trained_run / "report.html").read_text()
    assert (trained_run / "config.yaml").is_file()
    assert list((trained_run / "wandb").glob("offline-run-*/run-*.wandb"))


@pytest.fixture(scope="module")
def stages(data_dir, tmp_path_factory) -> dict[int, Path]:
    """Four steps under each ZeRO stage on two processes."""
    folder = tmp_path_factory.mktemp("stages")
    for stage in (0, 2, 3):
        done = train_small(
            data_dir, folder / str(stage), *QUICK, f"deepspeed=zero{stage}", processes=2
        )
        assert done.returncode == 0, done.stderr
    return {stage: folder / str(stage) for stage in (0, 2, 3)}


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_zero_stages_train_the_same_model(stages, stage, one_process):
    """The eval at the end ran, too; losses agree with those of one process without torchrun."""
    reference, rows = metrics(one_process), metrics(stages[stage])
    assert len(rows) == 4
    for row, expected in zip(rows, reference, strict=True):
        assert row["data_digest"] == expected["data_digest"]
        for key in ("loss", "loss_ar", "loss_diffusion", "grad_norm"):
            assert row[key] == pytest.approx(expected[key], rel=2e-4), key
    evals = (stages[stage] / "evals" / "decode_speed.jsonl").read_text().splitlines()
    assert {json.loads(line)["step"] for line in evals} == {4}


@pytest.fixture(scope="module")
def one_process(data_dir, tmp_path_factory) -> Path:
    """Four steps in one process, with another micro-batch and no launcher."""
    run_dir = tmp_path_factory.mktemp("one") / "run"
    done = train_small(data_dir, run_dir, *QUICK, "micro_batch_size=8")
    assert done.returncode == 0, done.stderr
    return run_dir


def test_bf16_trains(data_dir, tmp_path, one_process):
    done = train_small(data_dir, tmp_path / "run", *QUICK, "precision=bf16", "deepspeed=zero2")
    assert done.returncode == 0, done.stderr
    for row, expected in zip(metrics(tmp_path / "run"), metrics(one_process), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=0.02)


def test_autoregressive_twin_sees_the_same_data(data_dir, tmp_path, one_process):
    done = train_small(data_dir, tmp_path / "run", *QUICK, "objective=ar")
    assert done.returncode == 0, done.stderr
    rows, expected = metrics(tmp_path / "run"), metrics(one_process)
    assert [row["data_digest"] for row in rows] == [row["data_digest"] for row in expected]
    assert rows[0]["loss_ar"] == pytest.approx(expected[0]["loss_ar"], rel=1e-5)
    assert {row["loss_diffusion"] for row in rows} == {None}


def start_until_step(data_dir: Path, run_dir: Path, step: int, processes: int | None = None):
    """A running training that has written `step` lines of metrics."""
    overrides = (f"data.dir={data_dir}", f"run_dir={run_dir}", *SMALL_RUN, *LONGER)
    process = subprocess.Popen(
        command("pipeline.train", *overrides, processes=processes),
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        path = run_dir / "metrics.jsonl"
        if path.exists() and path.read_text().count("\n") >= step:
            return process
        time.sleep(0.02)
    process.kill()
    raise AssertionError(f"step {step} was not reached: {process.communicate()}")


@pytest.fixture(scope="module")
def uninterrupted(data_dir, tmp_path_factory) -> list[dict]:
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    done = train_small(data_dir, run_dir, *LONGER)
    assert done.returncode == 0, done.stderr
    return exact(metrics(run_dir))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_interrupted_and_continued_is_the_uninterrupted_run(
    data_dir, tmp_path, uninterrupted, number
):
    """Bit for bit, whether the process could save first or not; also in the same W&B run."""
    run_dir = tmp_path / "run"
    process = start_until_step(data_dir, run_dir, 7)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    if number == signal.SIGTERM:
        assert process.returncode == 75, errors
        assert "stopped (SIGTERM) after step" in output
        assert (run_dir / "interrupted").exists()
    id_before = (run_dir / "wandb" / "run_id").read_text()
    done = train_small(data_dir, run_dir, *LONGER)
    assert done.returncode == 0, done.stderr
    assert f"continuing {run_dir} after step" in done.stdout
    assert exact(metrics(run_dir)) == uninterrupted
    assert not (run_dir / "interrupted").exists()
    assert (run_dir / "wandb" / "run_id").read_text() == id_before


def test_data_of_which_nothing_is_held_out_trains_without_evals(tmp_path):
    data_dir = prepare_documents(tmp_path, "heldout_fraction=0")
    refused = train_small(data_dir, tmp_path / "run", "steps=2")
    assert f"data.dir: nothing of {data_dir} is held out" in only_error(refused)
    done = train_small(data_dir, tmp_path / "run", *QUICK)
    assert done.returncode == 0, done.stderr
    assert "no evals: nothing of the data is held out" in done.stdout
    assert len(metrics(tmp_path / "run")) == 4
    assert not (tmp_path / "run" / "evals" / "decode_speed.jsonl").exists()
    assert "<html" in (tmp_path / "run" / "report.html").read_text()


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(data_dir, trained_run, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(trained_run, run_dir)
    newest = run_dir / "checkpoints" / "step-00000012"
    damaged = max(newest.glob("*.pt"), key=lambda path: path.stat().st_size)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    done = train_small(data_dir, run_dir, processes=2)
    assert done.returncode == 0, done.stderr
    assert f"checkpoint step-00000012 is damaged and left alone: {damaged}" in done.stdout
    assert "after step 8" in done.stdout
    assert exact(metrics(run_dir)) == exact(metrics(trained_run))

    for path in (run_dir / "checkpoints").glob("step-*"):
        (path / "files.json").unlink()
    done = train_small(data_dir, run_dir, processes=1)
    assert done.returncode != 0
    assert "all checkpoints are damaged" in done.stderr
    assert len(list((run_dir / "checkpoints").glob("step-*"))) == 2


def test_a_continued_run_tells_how_it_trains_otherwise(data_dir, tmp_path):
    """An event and a line for each key, with both values; the same settings again tell nothing."""
    quick = ("evals.decode_speed.every=0", "wandb.mode=disabled", "preflight=false")
    other = ("steps=3", "optimizer.weight_decay=0.5", "objective.alpha=0.25",
             "schedule.warmup_steps=1")  # fmt: skip
    for overrides in (("steps=2",), other, (*other, "steps=4")):
        done = train_small(data_dir, tmp_path, *quick, *overrides)
        assert done.returncode == 0, done.stderr
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    changed = [event for event in map(json.loads, lines) if event["event"] == "config_changed"]
    assert [(e["step"], e["key"], e["was"], e["now"]) for e in changed] == [
        (2, "steps", 2, 3),
        (2, "optimizer.weight_decay", 0.1, 0.5),
        (2, "schedule.warmup_steps", 2, 1),
        (2, "objective.alpha", 1.0, 0.25),
        (3, "steps", 3, 4),
    ]
    assert changed[-1]["message"] in done.stdout


def test_a_continued_run_must_be_the_same_run(data_dir, one_process):
    before = (one_process / "metrics.jsonl").read_bytes()
    error = only_error(train_small(data_dir, one_process, *QUICK, "seed=1"))
    assert "checkpoint step-00000004 was made with seed=0, this run has seed=1" in error
    assert (one_process / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["steps=0"], "steps: must be at least 1"),
        (["steps=many"], "steps: "),
        (["optimizer.learning_rate=fast"], "optimizer.learning_rate"),
        (["model.depth=3"], "model.depth"),
        (["deepspeed=zero9"], "zero9"),
        (["data.dir=/nowhere"], "data.dir: /nowhere does not exist"),
        (["init_from=/nowhere"], "init_from: /nowhere does not exist"),
        (["layout.coverage=1.5"], "coverage"),
    ],
)
def test_mistakes_are_one_line_and_code_2(
    data_dir, tmp_path, overrides, expected, monkeypatch, capfd
):
    """In this process: all of them are found before any other is joined."""
    values = [f"data.dir={data_dir}", f"run_dir={tmp_path / 'run'}", *SMALL_RUN, *overrides]
    monkeypatch.setattr("sys.argv", ["tidar-train", *values])
    assert cli.run("train", train) == 2
    errors = capfd.readouterr().err
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert expected in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("global_batch_size=7", "global_batch_size: 7 is not a multiple of micro_batch_size 2 x 1"),
        ("evals.decode_speed.max_new_tokens=250", "evals.decode_speed.max_new_tokens: 8 prompt"),
        ("model.max_positions=32", "model.max_positions: 32, but the data's sequences have 64"),
    ],
)
def test_mistakes_that_only_show_when_the_run_is_put_together(
    data_dir, tmp_path, override, expected
):
    error = only_error(train_small(data_dir, tmp_path / "run", override))
    assert expected in error
