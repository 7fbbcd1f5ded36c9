"""`tidar-evaluate`: its settings, its output, and the command on a trained run."""

import json
import math
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from commands import run
from documented import documented
from evals_data import OneRank, make_model, model_config, write_data
from hydra import compose, initialize_config_dir

from data_prep.formats.manifest import Manifest
from pipeline.data.batch import sequence_digest
from pipeline.evals.heldout import HeldOut
from pipeline.evals.run import (
    SCHEMAS,
    EvaluateSettings,
    Origin,
    describe,
    measures_table,
    open_heldout,
    run_evals,
    write_results,
)
from pipeline.evals.settings import Progress
from tidar_common.cli import config_dir
from tidar_common.errors import UserError

SMALL = (
    "evals.decode_speed.prompts=2", "evals.decode_speed.prompt_tokens=4",
    "evals.decode_speed.max_new_tokens=8", "evals.decode_speed.score_sequences=3",
)  # fmt: skip


def settings(*overrides: str) -> EvaluateSettings:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return EvaluateSettings.from_config(compose("evaluate", overrides=list(overrides)))


@pytest.fixture
def checkpoint(tmp_path, data) -> Path:
    """What a run directory says of itself beside the weights."""
    folder = tmp_path / "run" / "checkpoints" / "step-00000040"
    folder.mkdir(parents=True)
    (folder.parent / "latest").write_text("step-00000040\n")
    (folder / "state.json").write_text(json.dumps({"step": 40}))
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": {"dir": str(data.folder)}}))
    return folder


def test_origin_of_a_checkpoint_and_of_its_run(checkpoint, data):
    for path in (checkpoint, checkpoint.parents[1]):
        assert Origin.of(path) == Origin(40, {"dir": str(data.folder)})


def test_origin_of_a_model_that_says_nothing(tmp_path):
    assert Origin.of(tmp_path) == Origin(None, {})


@pytest.mark.parametrize("name", ["state.json", "config.yaml"])
def test_damaged_descriptions_are_named(checkpoint, name):
    (checkpoint / name).write_text("{ [")
    with pytest.raises(UserError, match=name):
        Origin.of(checkpoint)


def test_defaults_measure_both_on_the_data_of_the_run(checkpoint, data):
    found = settings(f"checkpoint={checkpoint}")
    assert list(found.evals) == ["decode_speed", "likelihood"]
    assert found.data_dir == data.folder
    assert (found.output, found.dtype, found.device) == (None, None, None)


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("likelihood", ["likelihood"]),
        ("decode_speed", ["decode_speed"]),
        ("[tasks,likelihood]", ["likelihood", "tasks"]),
    ],
)
def test_evals_are_a_choice_or_a_list(checkpoint, choice, names):
    tasks = ["evals.tasks.tasks=[hellaswag]"] if "tasks" in choice else []
    found = settings(f"checkpoint={checkpoint}", f"evals={choice}", *tasks)
    assert list(found.evals) == names


def test_tasks_alone_need_no_data(tmp_path):
    found = settings(f"checkpoint={tmp_path}", "evals=tasks", "evals.tasks.tasks=[hellaswag]")
    assert found.data_dir is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["checkpoint=/no/such"], "checkpoint: /no/such does not exist"),
        (["checkpoint={tmp}"], r"data\.dir: has no value, and the checkpoint does not name"),
        (["checkpoint={run}", "data.dir=/no/such"], r"data\.dir: /no/such does not exist"),
        (["checkpoint={run}", "dtype=fp8"], "dtype: unknown value 'fp8'"),
        (["checkpoint={run}", "device=tpu"], "device: unknown value 'tpu'"),
        (["checkpoint={run}", "evals=[]"], "evals: none given"),
        (["checkpoint={run}", "evals=tasks"], r"evals\.tasks: tasks is empty"),
        (["checkpoint={run}", "evals.likelihood.sequences=0"], r"evals\.likelihood: sequences"),
        (["checkpoint={run}", "+evals.likelihood.sequence=1"], r"likelihood\.sequence: unknown"),
        (["checkpoint={run}", "+evals.speed.prompts=1"], r"evals\.speed: unknown eval"),
    ],
)
def test_mistakes_are_named(checkpoint, tmp_path, overrides, message):
    (tmp_path / "bare").mkdir()
    places = {"run": checkpoint, "tmp": tmp_path / "bare"}
    with pytest.raises(UserError, match=message):
        settings(*(override.format(**places) for override in overrides))


def test_data_that_moved_is_named(checkpoint):
    (checkpoint / "config.yaml").write_text(yaml.safe_dump({"data": {"dir": "/gone"}}))
    with pytest.raises(UserError, match=r"data\.dir: /gone, which the checkpoint names"):
        settings(f"checkpoint={checkpoint}")


@pytest.fixture(scope="module")
def second_set(data, tmp_path_factory) -> Path:
    """Another part of the same documents held out, in the tokens of `data`."""
    folder = tmp_path_factory.mktemp("second")
    own = data.folder / "tokenizer.model"
    return write_data(folder, "seed=5", f"tokenizer.path={own}").output_dir


def digests(heldout) -> list[bytes]:
    return [sequence_digest(sequence) for sequence in heldout.sequences(None, 0, 4, shift=False)]


def test_data_of_a_url_is_measured_like_its_folder(checkpoint, data, tmp_path):
    """Given on the command line, or named by the checkpoint."""
    url, cache = f"pipe:cat {data.folder}", tmp_path / "cache"
    with pytest.raises(UserError, match=r"data\.cache_dir: has no value"):
        settings(f"checkpoint={checkpoint}", f"data.dir='{url}'")
    given = settings(f"checkpoint={checkpoint}", f"data.dir='{url}'", f"data.cache_dir={cache}")
    run = {"data": {"dir": url, "cache_dir": str(cache), "skip_damaged": True, "later_key": 1}}
    (checkpoint / "config.yaml").write_text(yaml.safe_dump(run))
    named = settings(f"checkpoint={checkpoint}")
    moved = settings(f"checkpoint={checkpoint}", f"data.cache_dir={tmp_path / 'elsewhere'}")
    strict = settings(f"checkpoint={checkpoint}", "data.skip_damaged=false")
    assert (named.data.skip_damaged, strict.data.skip_damaged) == (True, False)
    assert given.data_dir == named.data_dir
    assert given.data_dir.parent == cache
    assert moved.data_dir.parent == tmp_path / "elsewhere"
    expected = digests(data.heldout)
    for found in (given, moved):
        assert digests(open_heldout(found.data_dir, data.tokenizer, found.data)) == expected


def test_sets_of_a_mix_are_held_out_one_by_one(checkpoint, data, second_set):
    """Those of the run, unless other data is given; and those of the command line."""
    mix = {
        "web": {"dir": str(data.folder), "weight": {0: 0.5, 10: 0.25}},
        "code": {"dir": str(second_set), "weight": 1},
    }
    run = {"data": {"dir": str(data.folder), "mix": mix}}
    (checkpoint / "config.yaml").write_text(yaml.safe_dump(run))
    found = settings(f"checkpoint={checkpoint}")
    sets = open_heldout(found.data_dir, data.tokenizer, found.data).by_source()
    assert list(sets) == ["code", "web"]
    second = HeldOut(second_set, Manifest.load(second_set))
    assert digests(sets["web"]) == digests(data.heldout)
    assert digests(sets["code"]) == digests(second) != digests(data.heldout)
    other = settings(f"checkpoint={checkpoint}", f"data.dir={second_set}")
    assert not open_heldout(other.data_dir, data.tokenizer, other.data).by_source()
    text = f"data.mix={{a:{{dir:{data.folder},weight:1}},b:{{dir:{second_set},weight:1}}}}"
    named = settings(f"checkpoint={checkpoint}", f"data.dir={second_set}", text)
    sets = open_heldout(named.data_dir, data.tokenizer, named.data).by_source()
    assert [digests(one) for one in sets.values()] == [digests(data.heldout), digests(second)]


def test_cuda_without_a_gpu_is_refused(checkpoint):
    world = SimpleNamespace(device=torch.device("cpu"))
    assert settings(f"checkpoint={checkpoint}").device_of(world) == torch.device("cpu")
    with pytest.raises(UserError, match="torch sees no GPU"):
        settings(f"checkpoint={checkpoint}", "device=cuda").device_of(world)


def test_data_of_another_tokenizer_is_refused(data, tmp_path):
    other = write_data(tmp_path, "tokenizer.vocab_size=309").output_dir
    assert open_heldout(data.folder, data.tokenizer).manifest == data.manifest
    with pytest.raises(UserError, match="another tokenizer"):
        open_heldout(other, data.tokenizer)


def test_results_are_written_whole_and_described(checkpoint, data, tmp_path):
    output = tmp_path / "new" / "results.json"
    asked = settings(f"checkpoint={checkpoint}", f"output={output}", *SMALL)
    model = make_model(model_config(data.tokenizer))
    said: list[str] = []
    results = run_evals(asked, model, data.tokenizer, OneRank(), said.append)
    write_results(output, results)
    assert json.loads(output.read_text()) == results
    assert [path.name for path in output.parent.iterdir()] == ["results.json"]
    assert said == ["running decode_speed", "running likelihood"]
    assert {row["step"] for row in results["decode_speed"]} == {40}
    text = describe(results)
    speed = results["decode_speed"][1]
    assert f"{speed['tokens_per_forward']:.4g}" in text
    assert f"{results['likelihood']['perplexity']:.4g}" in text
    assert max(map(len, text.splitlines())) < 120


def test_output_has_the_keys_that_the_page_explains(checkpoint, data, two_ranks):
    asked = settings(f"checkpoint={checkpoint}", "evals=likelihood")
    model = make_model(model_config(data.tokenizer))
    results = run_evals(asked, model, data.tokenizer, OneRank(), lambda text: None)
    keys = [key for key in documented("`tidar-evaluate` output") if key not in SCHEMAS]
    assert list(results) == [*keys, "likelihood"]
    assert list(results["likelihood"]) == documented("`likelihood`")
    if two_ranks["tasks"] is not None:
        assert list(two_ranks["tasks"]) == documented("`tasks`")


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="output: "):
        write_results(tmp_path / "file" / "results.json", {})


def test_table():
    columns = [
        {"method": "ar", "loss": 1.23456, "tokens": 12345, "rates": None, "none": None},
        {"method": "tidar", "loss": None, "rates": [0.5, None, 1.0], "b_by_place": [2.0, 3.0]},
    ]
    assert measures_table(columns).text().splitlines() == [
        "method            ar  tidar",
        "loss           1.235      –",
        "tokens        12,345      –",
        "rates 1            –    0.5",
        "rates 3            –      1",
        "b_by_place 0       –      2",
        "b_by_place 1       –      3",
    ]


def test_the_command_on_a_trained_run(trained_run, tmp_path):
    """Two processes; the eval at the end of training measured the same model on the same text."""
    output = tmp_path / "results.json"
    done = run(
        "pipeline.evaluate", f"checkpoint={trained_run}", f"output={output}",
        "evals.decode_speed.prompts=3", "evals.decode_speed.prompt_tokens=8",
        "evals.decode_speed.max_new_tokens=12", "evals.decode_speed.score_sequences=4",
        processes=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    assert (results["step"], results["processes"]) == (12, 2)
    lines = (trained_run / "evals" / "decode_speed.jsonl").read_text().splitlines()
    trained = [row for row in map(json.loads, lines) if row["step"] == 12]
    clock = (
        "tokens_per_second", "speedup_over_ar", "conversion", "tokens_per_second_range",
        "speedup_over_ar_range", "seconds_per_decoding_forward", "seconds_by_queries",
    )  # fmt: skip
    for row, expected in zip(results["decode_speed"], trained, strict=True):
        assert row.keys() == expected.keys()
        for key in row.keys() - set(clock):
            value = expected[key]
            assert row[key] == (pytest.approx(value) if isinstance(value, float) else value), key
    assert results["likelihood"]["whole_split"] is True
    assert "bits_per_byte" in done.stdout
    assert "| TiDAR | 0 | 4 |" in done.stdout
    assert str(output) in done.stdout


def test_the_command_refuses_in_one_line(tmp_path):
    done = run("pipeline.evaluate", f"checkpoint={tmp_path / 'no'}", f"output={tmp_path / 'o'}")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: checkpoint: ")
    assert not (tmp_path / "o").exists()


def test_help_names_the_groups():
    done = run("pipeline.evaluate", "--help")
    assert done.returncode == 0
    assert "decode_speed, likelihood, tasks" in done.stdout
    assert sys.executable not in done.stdout


def test_progress_is_told_once_in_a_while(monkeypatch):
    now, lines = [100.0], []
    monkeypatch.setattr("pipeline.evals.settings.time.monotonic", lambda: now[0])
    progress = Progress(lines.append, "decode_speed")
    for _ in range(1000):
        now[0] += 1.0
        progress()
    assert lines[:2] == [f"decode_speed: {n} answers and sequences begun, {n} s" for n in (10, 20)]
    told = [int(line.split()[1]) for line in lines]
    for earlier, later in pairwise(told):
        assert later - earlier == max(10, math.ceil(later / 10))
