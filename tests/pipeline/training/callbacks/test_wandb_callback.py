"""W&B mirrors the metrics file, continues its run, calls nobody offline, and never stops a run."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import wandb
from callback_data import EVAL_ROWS, steps
from wandb_file import history, records, run_record

from pipeline.training.callbacks import Callbacks
from pipeline.training.callbacks.metrics import MetricsFiles
from pipeline.training.callbacks.wandb import Wandb, WandbConfig, flatten, run_id
from pipeline.training.state import TrainState

RESOLVED = {"steps": 5, "optimizer": {"learning_rate": 0.1}}


def say_nothing(text: str) -> None:
    raise AssertionError(text)


def run(run_dir: Path, first: int, last: int, say=say_nothing, config=None) -> None:
    """One start of a training run: steps `first … last`, and an eval after the last."""
    mirror = Wandb(run_dir, config or WandbConfig(tags=("a", "b")), RESOLVED, say)
    callbacks = Callbacks([MetricsFiles(run_dir), mirror])
    callbacks.on_start(TrainState(step=first - 1))
    for metrics in steps(first, last):
        callbacks.on_step(metrics)
    callbacks.on_eval([{**row, "step": last} for row in EVAL_ROWS])
    callbacks.on_end(TrainState(step=last), finished=True)


def run_files(run_dir: Path, count: int) -> list[Path]:
    """The run's files, oldest first, once the service that writes them has closed them."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        files = sorted(run_dir.glob("wandb/offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime)
        kinds = [{record.WhichOneof("record_type") for record in records(file)} for file in files]
        if len(files) == count and all("exit" in found for found in kinds):
            return files
        time.sleep(0.1)
    raise AssertionError(f"{run_dir}: {files} were not finished")


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_equal(run_dir: Path, logged: dict[int, dict]) -> None:
    """W&B's history holds every number of the metrics file and of the eval file, and no other."""
    expected: dict[int, dict] = {}
    for row in read(run_dir / "metrics.jsonl"):
        present = {key: value for key, value in row.items() if value is not None}
        expected[row["step"]] = {f"train/{key}": value for key, value in present.items()}
    for row in read(run_dir / "evals" / "decode_speed.jsonl"):
        prefix = f"decode_speed/{row['method']}/temperature_{row['temperature']:g}"
        expected[row["step"]].update(flatten(prefix, row))
    ours = {
        step: {key: value for key, value in values.items() if not key.startswith("_")}
        for step, values in logged.items()
    }
    assert ours == expected


def test_offline_history_is_the_metrics_file(tmp_path):
    run(tmp_path, 1, 5)
    (file,) = run_files(tmp_path, 1)
    check_equal(tmp_path, history(file))
    record = run_record(file)
    assert record.run_id == run_id(tmp_path / "wandb")
    assert (record.project, record.display_name) == ("tidar", tmp_path.name)
    assert list(record.tags) == ["a", "b"]
    config = {item.key: json.loads(item.value_json) for item in record.config.update if item.key}
    assert {key: config[key] for key in RESOLVED} == RESOLVED


def test_a_second_start_continues_the_same_run(tmp_path):
    run(tmp_path, 1, 3)
    run_files(tmp_path, 1)
    time.sleep(1.1)  # W&B names a start's folder by the second
    run(tmp_path, 4, 5)
    first, second = run_files(tmp_path, 2)
    assert run_record(first).run_id == run_record(second).run_id
    before, after = history(first), history(second)
    assert (sorted(before), sorted(after)) == ([1, 2, 3], [4, 5])
    check_equal(tmp_path, before | after)


def test_another_run_directory_is_another_run(tmp_path):
    ids = set()
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        ids.add(run_id(folder))
        assert run_id(folder) in ids
        assert [path.name for path in folder.iterdir()] == ["run_id"]
    assert len(ids) == 2


def test_disabled_writes_nothing(tmp_path):
    run(tmp_path, 1, 2, config=WandbConfig(mode="disabled"))
    assert not (tmp_path / "wandb").exists()
    assert len(read(tmp_path / "metrics.jsonl")) == 2


def test_a_start_that_fails_is_told_once_and_stops_nothing(tmp_path, monkeypatch):
    def broken(**options):
        raise OSError("no space left")

    monkeypatch.setattr(wandb, "init", broken)
    said: list[str] = []
    run(tmp_path, 1, 5, say=said.append)
    assert len(said) == 1
    assert "could not start (no space left)" in said[0]
    assert len(read(tmp_path / "metrics.jsonl")) == 5


@pytest.mark.parametrize("failing", ["log", "finish"])
def test_a_failure_on_the_way_is_told_once_and_stops_nothing(tmp_path, monkeypatch, failing):
    class Run:
        def log(self, values, step):
            if failing == "log" and step == 2:
                raise ConnectionError("service is gone")

        def finish(self):
            if failing == "finish":
                raise ConnectionError("service is gone")

    monkeypatch.setattr(wandb, "init", lambda **options: Run())
    said: list[str] = []
    run(tmp_path, 1, 5, say=said.append)
    assert len(said) == 1
    assert f"could not {failing} (service is gone)" in said[0]
    assert len(read(tmp_path / "metrics.jsonl")) == 5


def test_flatten_counts_positions_from_one_and_leaves_out_what_is_missing():
    row = {
        "step": 9, "temperature": 1.0, "method": "tidar", "tokens": 3, "exact_match_ar": None,
        "acceptance_by_position": [0.5, None, 0.25],
    }  # fmt: skip
    assert flatten("p", row) == [
        ("p/tokens", 3),
        ("p/acceptance_by_position/1", 0.5),
        ("p/acceptance_by_position/3", 0.25),
    ]


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="mode must be one of offline, online, disabled"):
        WandbConfig(mode="on")


class CountingProxy:
    """Accepts connections, notes their first line and closes them."""

    def __init__(self) -> None:
        self.server = socket.create_server(("127.0.0.1", 0))
        self.lines: list[bytes] = []
        threading.Thread(target=self._serve, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        address = f"http://127.0.0.1:{self.server.getsockname()[1]}"
        names = ("http_proxy", "https_proxy", "all_proxy")
        return {n: address for name in names for n in (name, name.upper())}

    def _serve(self) -> None:
        while True:
            connection, _ = self.server.accept()
            with connection:
                self.lines.append(connection.recv(200).split(b"\r\n")[0])


def test_offline_calls_nobody(tmp_path):
    """A whole offline run in a process, and a W&B service, whose only way out is counted."""
    proxy = CountingProxy()
    code = (
        "import sys, pathlib, test_wandb_callback\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "test_wandb_callback.run(folder, 1, 3)\n"
        "test_wandb_callback.run_files(folder, 1)\n"
    )
    root = Path(__file__).parents[4]
    environment = os.environ | proxy.environment | {"no_proxy": "", "NO_PROXY": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), str(root)])
    environment["WANDB_API_KEY"] = "0" * 40  # even somebody who is logged in
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=True)
    assert proxy.lines == []
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({"http": proxy.environment["http_proxy"]})
    )
    with pytest.raises(OSError, match=r"."):
        opener.open("http://api.wandb.ai/", timeout=10)
    assert proxy.lines == [b"GET http://api.wandb.ai/ HTTP/1.1"]
