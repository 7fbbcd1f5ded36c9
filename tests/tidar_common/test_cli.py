"""The shell around the entry points: one line for a mistake, a traceback for a fault, the codes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError

from tidar_common.cli import config_dir, one_line, run
from tidar_common.errors import UserError

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
        ("corpus=nothing", "Could not find 'corpus/nothing'"),
        ("nothing=1", "nothing: unknown key; see --help"),
        ("sequence_lenght=1", "sequence_lenght: unknown key; did you mean sequence_length?"),
        ("layout.shfit=true", "layout.shfit: unknown key; did you mean layout.shift?"),
        ("tokenizer.vocab=1", "tokenizer.vocab: unknown key; did you mean tokenizer.vocab_size?"),
        ("tokenizer=null", "must be a string or a list"),
        ("seed", "seed"),
        ("seed=[", "seed=[: "),
        ("--config-name=nothing", "nothing"),
    ],
)
def test_what_hydra_refuses_is_one_line(call, argument, text):
    code, out, error = call(lambda cfg: pytest.fail("must not be called"), argument)
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert error.startswith("error: ")
    assert text in error


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
    assert (config_dir() / "prepare.yaml").is_file()


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
