"""`tidar-check`: what is wrong with a run is said before it is submitted, in one line."""

import shutil
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
from commands import ROOT, SMALL_RUN

from pipeline.check import check
from pipeline.planning import checks
from tidar_common.cli import run as run_task


@pytest.fixture
def checking(monkeypatch, capsys, data_dir, tmp_path):
    """Runs tidar-check in this process; returns exit code, stdout and stderr."""

    def call(*overrides: str, data=data_dir, run_dir=tmp_path / "run") -> tuple[int, str, str]:
        argv = ["tidar-check", f"data.dir={data}", f"run_dir={run_dir}", *SMALL_RUN,
                "cluster.gpus_per_node=2", *overrides]  # fmt: skip
        monkeypatch.setattr(sys, "argv", argv)
        code = run_task("check", check)
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
    for what in ("init_from: ", "memory: ", "run_dir: "):
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


def test_a_run_that_goes_on_and_one_that_is_done(checking, trained_run):
    _, out, _ = checking("steps=13", run_dir=trained_run)
    assert "goes on after step 12" in out
    assert "has all 12 steps already" in refused(checking(run_dir=trained_run))


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


def submit(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "slurm" / "submit.sh"), *arguments],
        env={"PATH": "/usr/bin:/bin", "TIDAR_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_submit_prints_plan_command_and_script_without_submitting(data_dir, tmp_path):
    done = submit(
        "--dry-run", "--nodes=2", "--gpus-per-node=h100:2", "--exclusive", f"data.dir={data_dir}",
        f"run_dir={tmp_path / 'run'}", *SMALL_RUN,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "8 sequences = 2 x 1 accumulation steps x 4 processes" in done.stdout
    assert (
        "would submit: 'sbatch' '--nodes=2' '--gpus-per-node=h100:2' '--exclusive'" in done.stdout
    )
    assert "FLOPs a step" in done.stdout
    assert "#SBATCH --job-name=tidar-train" in done.stdout


@pytest.mark.parametrize(
    ("argument", "said"), [("-N", "with = (--nodes=4"), ("--nodes=1-2", "one number each")]
)
def test_submit_refuses_options_it_would_misread(argument, said):
    done = submit(argument, "2")
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
