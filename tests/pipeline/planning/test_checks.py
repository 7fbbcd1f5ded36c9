"""`tidar-plan check=true`: what is wrong with a run is said before it is submitted, in one line."""

import json
import shutil
import socket
import sys
from types import SimpleNamespace

import pytest
from commands import SMALL_RUN

from pipeline.plan import plan
from pipeline.planning import checks
from pipeline.planning import plan as planning
from tidar_common.cli import run as run_task


@pytest.fixture
def checking(monkeypatch, capsys, data_dir, tmp_path):
    """Runs the check in this process; returns exit code, stdout and stderr."""

    def call(*overrides: str, data=data_dir, run_dir=tmp_path / "run") -> tuple[int, str, str]:
        argv = ["tidar-plan", "check=true", *SMALL_RUN, "cluster.gpus_per_node=2", *overrides]
        if data is not None:
            argv += [f"data.dir={data}", f"run_dir={run_dir}"]
        monkeypatch.setattr(sys, "argv", argv)
        code = run_task("plan", plan)
        return code, *capsys.readouterr()

    return call


def refused(result: tuple[int, str, str]) -> str:
    """The one line of a refusal."""
    code, out, err = result
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "ready to submit" not in out
    return err


def test_a_run_that_can_start(checking, tmp_path):
    code, out, err = checking()
    assert (code, err) == (0, "")
    assert out.count("  ok  ") == 7
    assert "8 sequences = 2 x 2 accumulation steps x 2 processes" in out
    assert not (tmp_path / "run").exists(), "a check leaves nothing behind"


def test_a_shard_that_is_missing_or_short_is_named(checking, data_dir, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(data_dir, data)
    shard = next((data / "train").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-512])
    assert f"{shard} has {shard.stat().st_size} bytes" in refused(checking(data=data))
    shard.unlink()
    assert f"data.dir: {shard} is missing" in refused(checking(data=data))


def test_everything_that_is_wrong_is_said_at_once(checking, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    err = refused(
        checking(
            f"init_from={tmp_path / 'empty'}", "cluster.gpu=x", "cluster.memory_gib=4.001",
            run_dir=tmp_path / "file" / "run",
        )
    )  # fmt: skip
    for what in (f"{tmp_path / 'empty'}: holds no model", "memory: ", "run_dir: "):
        assert what in err


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("global_batch_size=6", "global_batch_size: 6 is not a multiple"),
        ("objective.alpa=1", "did you mean objective.alpha?"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate"),
    ],
)
def test_the_config_is_checked_first(checking, override, said):
    assert said in refused(checking(override))


def test_checkpoints_that_do_not_fit_on_the_disk(checking, monkeypatch):
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    assert "set checkpoint.keep_last lower" in refused(checking())


def test_a_run_that_goes_on_one_that_is_done_and_another_run(checking, trained_run):
    _, out, _ = checking("steps=13", run_dir=trained_run)
    assert "goes on after step 12" in out
    assert "has all 12 steps already" in refused(checking(run_dir=trained_run))
    assert "was made with seed=0, this run has seed=1" in refused(
        checking("steps=13", "seed=1", run_dir=trained_run)
    )


def test_what_training_refuses_is_refused_by_its_own_words(checking, tmp_path):
    """A held-out split without a prompt, a model that is of no known family, blocks longer than
    sequences, an attention backend that a CPU does not have."""
    assert "evals.decode_speed.prompt_tokens: no held-out document has more than 64" in refused(
        checking("evals.decode_speed.prompt_tokens=64")
    )
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert "model_type 'gpt2' is not one of" in refused(checking(f"init_from={other}"))
    assert "init_from: /not/there does not exist" in refused(checking("init_from=/not/there"))
    assert "layout.block_size: 65 is longer" in refused(checking("layout.block_size=65"))
    assert "attention: flex has no backward pass" in refused(
        checking("attention=flex", "cluster.gpu=cpu")
    )


def test_many_passes_over_the_data_are_worth_a_note(checking):
    assert "note" not in checking("steps=12")[1]
    code, out, _ = checking("steps=1000000")
    assert code == 0
    assert "beyond 4 times text teaches little more" in out


def test_processes_without_a_gpu_share_the_memory_of_the_host(checking, monkeypatch):
    monkeypatch.setattr(planning, "free_memory_bytes", lambda: 6 << 30)
    assert "of 3 GiB a process" in checking("cluster.gpu=cpu")[1]
    monkeypatch.setattr(planning, "free_memory_bytes", lambda: 1 << 20)
    err = refused(checking("cluster.gpu=cpu"))
    assert "shared by 2; for another say cluster.gpu or cluster.memory_gib" in err
    assert checking("cluster.gpu=cpu", "cluster.memory_gib=8")[0] == 0
    assert checking("cluster.gpu=h100_80gb")[0] == 0


def test_an_experiment_names_the_data_and_the_run(checking, data_dir, tmp_path):
    """It stands in a folder of the user's own."""
    file = tmp_path / "mine" / "experiment" / "first.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(
        f"# @package _global_\ndata: {{dir: {data_dir}}}\nrun_dir: {tmp_path / 'first'}\n"
    )
    code, out, err = checking(f"--config-dir={tmp_path / 'mine'}", "experiment=first", data=None)
    assert (code, err) == (0, "")
    assert f"in {data_dir}" in out
    assert f"{tmp_path / 'first'} is new" in out
    assert "data.dir: has no value" in refused(checking(data=None))


def test_wandb_online_needs_a_key_and_a_server(checking, monkeypatch, tmp_path):
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
        assert "there is no key for 127.0.0.1" in refused(checking("wandb.mode=online"))
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password key\n")
        code, out, _ = checking("wandb.mode=online")
        assert (code, "online, 127.0.0.1" in out) == (0, True)
    assert f"127.0.0.1:{port} does not answer" in refused(checking("wandb.mode=online"))
