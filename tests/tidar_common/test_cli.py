"""The shell around the entry points: one line for a mistake, a traceback for a fault, the codes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError

from tidar_common.cli import compose, config_dir, run
from tidar_common.errors import UserError
from tidar_common.overrides import by_words, one_line

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def call(monkeypatch, capsys):
    """Run `task` behind `tidar-prepare output_dir=x …`; returns (code, stdout, stderr)."""

    def with_task(task, *arguments):
        monkeypatch.setattr(sys, "argv", ["tidar-prepare", "output_dir=x", *arguments])
        code = run("prepare", task)
        return code, *capsys.readouterr()

    return with_task


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (130, 130), (75, 75)])
def test_a_task_s_code_is_handed_on(call, returned, code):
    assert call(lambda cfg: returned) == (code, "", "")


def test_a_task_gets_the_config_with_its_overrides(call):
    seen = []
    call(lambda cfg: seen.append(OmegaConf.to_container(cfg)), "seed=7", "corpus=jsonl")
    assert seen[0]["seed"] == 7
    assert seen[0]["corpus"]["kind"] == "jsonl"
    assert "hydra" not in seen[0]


def test_a_mistake_is_one_line_and_code_2(call):
    def task(cfg):
        raise UserError("seed: wrong;\nchoose another")

    assert call(task) == (2, "", "error: seed: wrong; choose another\n")


@pytest.mark.parametrize("addition", ["+sede=7", "++sede.x=7"])
def test_a_key_that_no_file_has_is_refused_however_it_came(call, addition):
    """As an experiment's file would bring it, which Hydra takes without a word."""
    said = "error: sede: unknown key; did you mean seed?\n"
    assert call(lambda cfg: pytest.fail("was called"), addition) == (2, "", said)


def test_a_mistake_names_the_rank(call, monkeypatch):
    monkeypatch.setenv("RANK", "3")

    def task(cfg):
        raise UserError("seed: wrong")

    assert call(task)[2] == "error (rank 3): seed: wrong\n"


def test_a_key_that_is_not_there_is_a_mistake(call):
    code, _, error = call(lambda cfg: cfg.nothing)
    assert (code, error.count("\n")) == (2, 1)
    assert "nothing" in error


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        ("corpus=nothing", "corpus: unknown choice 'nothing'; known are arrow, jsonl, mix, "),
        ("nothing=1", "nothing: unknown key; see --help"),
        ("sequence_lenght=1", "sequence_lenght: unknown key; did you mean sequence_length?"),
        ("layout.shfit=true", "layout.shfit: unknown key; did you mean layout.shift?"),
        ("tokenizer.vocab=1", "tokenizer.vocab: unknown key; did you mean tokenizer.vocab_size?"),
        ("tokenizer=null", "must be a string or a list"),
        ("seed", "seed"),
        ("seed=[", "seed=[: "),
        ("corpus.path=~/x", """as in 'corpus.path="~/x"'"""),
        ("output_dir=runs/é", """as in 'output_dir="runs/é"'"""),
        ("output_dir=a/lr=0.1", """as in 'output_dir="a/lr=0.1"'"""),
        ("--config-name=nothing", "nothing"),
    ],
)
def test_what_hydra_refuses_is_one_line(call, argument, text):
    code, out, error = call(lambda cfg: pytest.fail("must not be called"), argument)
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert error.startswith("error: ")
    assert text in error


@pytest.mark.parametrize(
    ("command", "arguments", "text"),
    [
        ("train", ["optimizer.lr=1"], "optimizer.lr: unknown key; did you mean "
         "optimizer.learning_rate?"),
        ("train", ["batch_size=1"], "batch_size: unknown key; did you mean global_batch_size or "
         "micro_batch_size?"),
        ("train", ["sequence_length=9"], "sequence_length: unknown key; it is decided by "
         "tidar-prepare"),
        ("train", ["evals=likelihood"], "evals"),
        ("train", ["+evals.decode.every=3"], "evals.decode: unknown key; did you mean "
         "evals.decode_speed?"),
        ("prepare", ["tokenizer=huggingface", "tokenizer.vocab_size=900"], "tokenizer.vocab_size: "
         "not a key of tokenizer=huggingface; it is one of tokenizer=sentencepiece"),
        ("evaluate", ["evals=[tasks,nothing]"], "evals: unknown choice 'nothing'; known are code, "
         "decode_speed, likelihood, tasks"),
    ],
)  # fmt: skip
def test_a_key_is_answered_with_the_one_that_was_meant(capsys, monkeypatch, command, arguments,
                                                       text):  # fmt: skip
    monkeypatch.setattr(sys, "argv", [command, *arguments])
    assert run(command, lambda cfg: pytest.fail("must not be called")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert text in error


@pytest.mark.parametrize("command", ["train", "plan"])
@pytest.mark.parametrize("group", ["experiment", "model", "objective", "deepspeed", "curriculum"])
def test_a_misspelt_choice_is_refused_with_those_that_exist(capsys, monkeypatch, command, group):
    monkeypatch.setattr(sys, "argv", [command, f"{group}=nothing"])
    assert run(command, lambda cfg: pytest.fail("must not be called")) == 2
    names = ", ".join(sorted(path.stem for path in (config_dir() / group).glob("*.yaml")))
    assert capsys.readouterr().err == (
        f"error: {group}: unknown choice 'nothing'; known are {names}\n"
    )


def test_a_misspelt_choice_inside_an_experiment_is_refused(capsys, monkeypatch, tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: tinny\n"
    )
    monkeypatch.setattr(sys, "argv", ["train", f"--config-dir={tmp_path}", "experiment=mine"])
    assert run("train", lambda cfg: pytest.fail("must not be called")) == 2
    error = capsys.readouterr().err
    assert "model: unknown choice 'tinny'" in error
    assert "qwen2_5_1_5b, qwen3_8b, small" in error
    assert error.count("\n") == 1


def test_a_single_value_for_a_list_is_said(capsys, monkeypatch):
    from pipeline.training.config import WandbConfig
    from tidar_common.config import parse

    cfg = compose("train", ["wandb.tags=a"])
    with pytest.raises(UserError, match=r"wandb.tags: must be a list, such as wandb.tags=\[a\]"):
        parse(WandbConfig, cfg.wandb, "wandb")


def test_words_and_initials_find_keys_beside_first():
    known = ["a.learning_rate", "b.learning_rate", "b.warm_up", "rate"]
    assert by_words("b.lr", known) == ["b.learning_rate"]
    assert by_words("lr", known) == ["a.learning_rate", "b.learning_rate"]
    assert by_words("b.rate", known) == ["b.learning_rate"]
    assert by_words("c.up_warm", known) == ["b.warm_up"]
    assert by_words("other", known) == []


@pytest.mark.parametrize("command", ["prepare", "train", "evaluate", "generate", "export", "plan"])
def test_help_has_a_line_for_each_key_with_its_value_and_waits_for_no_torch(command):
    """In a process of its own, so that nothing has imported torch before."""
    code = (
        "import sys; from tidar_common.cli import run; from tidar_common import schema;"
        f"code = run({command!r}, print); assert 'torch' not in sys.modules;"
        f"print('|'.join(key.name for key in schema.command({command!r}).key_list()));"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    *lines, keys = done.stdout.splitlines()
    for key in keys.split("|"):
        assert any(line.startswith(f"  {key}=") for line in lines), key
    shown = [line for line in lines if line.startswith("  deepspeed=")]
    assert bool(shown) == (command in ("train", "plan"))


def test_a_fault_keeps_its_traceback(call):
    def task(cfg):
        raise ZeroDivisionError("a fault")

    with pytest.raises(ZeroDivisionError, match="a fault"):
        call(task)


def test_hints_about_debugging_are_left_out():
    error = ConfigAttributeError("Key 'x' is not in struct\n    full_key: x\n    object_type=dict")
    assert one_line(error) == "Key 'x' is not in struct"
    assert one_line(KeyError()) == "KeyError"


def test_nothing_is_written_by_the_shell(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call(lambda cfg: 0)
    assert list(tmp_path.iterdir()) == []


def test_the_config_folder_is_found_from_anywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert (config_dir() / "experiment" / "demo.yaml").is_file()


def test_the_real_command_line(tmp_path):
    """Exit code 2, one line, no traceback, through the interpreter as a shell starts it."""
    done = subprocess.run(
        [sys.executable, "-m", "data_prep.prepare", f"output_dir={tmp_path / 'x'}", "workers=0"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: workers: must be at least 1, got 0\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["output_dir=x"]])
def test_a_reader_that_has_ended_ends_the_command_in_silence(tmp_path, arguments):
    """As `head` does; the pipe is closed before the command writes."""
    code = "from tidar_common.cli import run; import sys; sys.exit(run('prepare', print))"
    read, write = os.pipe()
    os.close(read)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        stdout=write, stderr=subprocess.PIPE, cwd=tmp_path, env=environment, text=True,
        check=False,
    )  # fmt: skip
    os.close(write)
    assert (result.returncode, result.stderr) == (141, "")


def test_another_broken_pipe_is_a_fault(monkeypatch):
    def breaks(cfg):
        raise BrokenPipeError

    monkeypatch.setattr(sys, "argv", ["tidar-prepare", "output_dir=x"])
    with pytest.raises(BrokenPipeError):
        run("prepare", breaks)
