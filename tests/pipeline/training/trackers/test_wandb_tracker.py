"""W&B mirrors the metrics file, continues its run, calls nobody offline, and never stops a run."""

import json
import os
import re
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
from tracker_data import EVAL_ROWS, steps
from wandb_file import history, records, rows_of, run_record

from pipeline.data.order import TrainState
from pipeline.training.moments import Together
from pipeline.training.trackers.metrics import MetricsFiles, eval_values, flatten
from pipeline.training.trackers.wandb import (
    SOURCES_TABLE,
    TABLE,
    Wandb,
    WandbConfig,
    cut_torn_record,
    run_id,
)

RESOLVED = {"steps": 5, "optimizer": {"learning_rate": 0.1}}
RANKS = [{"host": host, "device": "cpu"} for host in ("n1", "n1", "n2")]


def say_nothing(text: str) -> None:
    raise AssertionError(text)


def run(run_dir: Path, first: int, last: int, say=say_nothing, config=None) -> None:
    """One start of a training run: steps `first … last`, and an eval after the last."""
    mirror = Wandb(run_dir, config or WandbConfig(tags=("a", "b")), RESOLVED, say, RANKS)
    trackers = Together([MetricsFiles(run_dir), mirror])
    trackers.on_start(TrainState(step=first - 1))
    for metrics in steps(first, last):
        trackers.on_step(metrics)
    trackers.on_eval([{**row, "step": last} for row in EVAL_ROWS])
    trackers.on_end(TrainState(step=last), finished=True)


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
    groups = {
        "train": (
            "loss", "loss_ar", "loss_diffusion", "loss_alone", "learning_rate",
            "grad_norm", "mask_embedding_norm",
        ),
        "data": ("sequences_seen", "data_digest", "data_wait_seconds"),
        "system": (
            "tokens_per_second", "step_seconds", "model_tflops", "mfu", "peak_memory_bytes",
        ),
    }  # fmt: skip
    expected: dict[int, dict] = {}
    for row in read(run_dir / "metrics.jsonl"):
        values = {"step": row["step"], "tokens": row["tokens"]}
        for group, keys in groups.items():
            values |= {f"{group}/{key}": row[key] for key in keys if row[key] is not None}
        assert len(values) == sum(value is not None for value in row.values()), "a key is nowhere"
        expected[row["step"]] = values
    for row in read(run_dir / "evals" / "decode_speed.jsonl"):
        expected[row["step"]].update(eval_values(row))
    ours = {
        step: {
            key: value
            for key, value in values.items()
            if not key.startswith("_") and not is_media(key)
        }
        for step, values in logged.items()
    }
    assert ours == expected


def is_media(key: str) -> bool:
    """Whether a key of the history is one of a table's or a page's, such as decode/table/sha256."""
    media = ("table", "sources", "acceptance_temperature", "generation")
    return key.startswith(tuple(f"decode/{name}" for name in media))


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


def test_wandb_s_own_reader_finds_the_same(tmp_path):
    """`wandb leet inspect` of the releases that have it: every number, at its step."""
    run(tmp_path, 1, 3)
    (file,) = run_files(tmp_path, 1)
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    if "No such command" in done.stderr:
        pytest.skip("this release of wandb has no leet inspect")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    logged: dict[int, dict] = {}
    for row in rows:
        if row["type"] == "history":
            items = row["history"]["item"]
            logged.setdefault(int(items["step"]), {}).update(items)
    check_equal(tmp_path, logged)
    assert run_id(tmp_path / "wandb") in {row["run"]["run_id"] for row in rows if "run" in row}


def test_a_second_start_continues_the_same_run(tmp_path):
    run(tmp_path, 1, 3)
    (file,) = run_files(tmp_path, 1)
    with file.open("ab") as torn:
        torn.write(b"????\x30\x00\x01 half a record")  # as a kill leaves it
    time.sleep(1.1)  # W&B names a start's folder by the second
    run(tmp_path, 4, 5)
    first, second = run_files(tmp_path, 2)
    assert run_record(first).run_id == run_record(second).run_id
    before, after = history(first), history(second)
    assert (sorted(before), sorted(after)) == ([1, 2, 3], [4, 5])
    check_equal(tmp_path, before | after)


@pytest.mark.parametrize("lost", [0, 1, 9, 150, 4000])
def test_a_kill_in_the_middle_of_a_record_is_mended_by_the_next_start(tmp_path, lost):
    """`wandb sync` stops at a torn file, and later starts would not be uploaded."""
    run(tmp_path, 1, 3)
    (file,) = run_files(tmp_path, 1)
    kept = [record.SerializeToString() for record in records(file)]
    os.truncate(file, file.stat().st_size - lost)
    cut_torn_record(file)
    mended = [record.SerializeToString() for record in records(file)]
    assert mended == kept[: len(mended)]
    assert len(mended) == len(kept) if lost == 0 else len(kept) > len(mended) > 3
    size = file.stat().st_size
    cut_torn_record(file)
    assert file.stat().st_size == size


def test_an_eval_made_up_after_a_restart_has_its_axes_and_a_row_of_its_own(tmp_path):
    """The run was stopped between a save and the eval that was due; the next start begins with it.
    W&B drops what comes under a step of its own that it has passed: none is given."""
    mirror = Wandb(tmp_path, WandbConfig(), RESOLVED, say_nothing, RANKS)
    trackers = Together([MetricsFiles(tmp_path), mirror])
    trackers.on_start(TrainState(step=3, tokens=300))
    trackers.on_eval([{**row, "step": 3} for row in EVAL_ROWS])
    for metrics in steps(4, 5):
        trackers.on_step(metrics)
    trackers.on_end(TrainState(step=5), finished=True)
    (file,) = run_files(tmp_path, 1)
    rows = [row for row in rows_of(file) if not any(map(is_media, row))]
    assert [(row["step"], row["tokens"]) for row in rows] == [(3, 300)] * 4 + [(4, 400), (5, 500)]
    assert [set(eval_values({**row, "step": 3})) <= set(logged)
            for row, logged in zip(EVAL_ROWS, rows, strict=False)] == [True] * 4  # fmt: skip
    counters = [row["_step"] for row in rows_of(file)]
    assert counters == sorted(set(counters))


def test_evals_are_a_table_a_heat_map_and_a_page(tmp_path):
    (tmp_path / "evals").mkdir()
    example = {"step": 3, "prompt": "a <b>", "method": "tidar", "temperature": 0.0,
               "tokens": [{"text": "x&", "forward": 1}, {"text": "y", "forward": 1}]}  # fmt: skip
    (tmp_path / "evals" / "example.json").write_text(json.dumps(example))
    run(tmp_path, 1, 3)
    (file,) = run_files(tmp_path, 1)
    media = file.parent / "files" / "media"
    (table,) = media.glob("table/decode/table*.json")
    content = json.loads(table.read_text())
    rows = read(tmp_path / "evals" / "decode_speed.jsonl")
    assert content["columns"] == list(TABLE)
    assert content["data"] == [[row[name] for name in TABLE] for row in rows]
    (table,) = media.glob("table/decode/sources*.json")
    content = json.loads(table.read_text())
    assert content["columns"] == ["step", "temperature", "source", *SOURCES_TABLE]
    numbers = [2.5, 3.5, 1.625, 1.25, 1.5, 1.75, 0.0625, "[0.5, 0.25]", "[0.5, 0.125]"]
    assert content["data"][0] == [3, 0.0, "code", *numbers]
    assert [row[1:3] for row in content["data"]] == [
        [temperature, source] for temperature in (0.0, 1.0) for source in ("code", "web")
    ]
    (page,) = media.glob("html/decode/generation*.html")
    assert "&lt;b&gt;" in page.read_text()
    assert 'title="forward 1: 2 tokens"' in page.read_text()
    maps = sorted(path.name.split("_")[2] for path in media.glob("html/decode/acceptance*.html"))
    assert maps == ["0", "1"]
    (at_0,) = media.glob("html/decode/acceptance_temperature_0_*.html")
    cells = re.findall(r">([^<>]+)</t[hd]>", at_0.read_text())
    (shares,) = (r["acceptance_by_position"] for r in rows
                 if (r["method"], r["temperature"]) == ("tidar", 0.0))  # fmt: skip
    positions = [str(place) for place in range(1, len(shares) + 1)]
    assert sorted(cells) == sorted([*positions, "3", "62%"]), "no step reached the second position"


def test_panels_have_axes_and_the_run_says_what_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    run(tmp_path, 1, 2)
    (file,) = run_files(tmp_path, 1)
    metrics = [r.metric for r in records(file) if r.WhichOneof("record_type") == "metric"]
    axes = {m.glob_name: m.step_metric for m in metrics if m.glob_name}
    assert axes == {
        "train/*": "tokens", "decode/*": "tokens", "data/*": "step", "system/*": "step",
        "events/*": "step",
    }  # fmt: skip
    updates = [r.config for r in records(file) if r.WhichOneof("record_type") == "config"]
    updates += [run_record(file).config]
    found = {item.key: item.value_json for config in updates for item in config.update}
    environment = json.loads(found["environment"])
    assert environment["hosts"] == {"n1": 2, "n2": 1}
    assert (environment["devices"], environment["processes"]) == ({"cpu": 3}, 3)
    assert environment["slurm_nodes"] == "n[1-2]"
    assert environment["packages"]["wandb"] == wandb.__version__
    if (Path(__file__).parents[4] / ".git").exists():
        assert len(environment["git_commit"]) == 40


def test_alerts_for_what_is_out_of_the_ordinary_and_checkpoints_by_choice(tmp_path):
    folder = tmp_path / "checkpoints" / "step-00000002"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    mirror = Wandb(tmp_path, WandbConfig(checkpoints=True), RESOLVED, say_nothing, RANKS)
    mirror.on_start(TrainState())
    for kind in ("started", "step_skipped"):
        mirror.on_event({"event": kind, "step": 2, "message": f"{kind} it was"})
    mirror.on_checkpoint(2, folder.name)
    mirror.on_end(TrainState(step=2), finished=True)
    (file,) = run_files(tmp_path, 1)
    alerts = [r.alert for r in records(file) if r.WhichOneof("record_type") == "alert"]
    assert [(a.title, a.text) for a in alerts] == [
        (f"{tmp_path.name}: step skipped", "step_skipped it was")
    ]
    requests = [r.request.log_artifact for r in records(file) if r.request.HasField("log_artifact")]
    artifacts = [r.artifact for r in records(file) if r.WhichOneof("record_type") == "artifact"]
    artifacts += [request.artifact for request in requests]
    references = [e.ref for a in artifacts if a.type == "checkpoint" for e in a.manifest.contents]
    assert any(str(folder) in reference for reference in references), artifacts


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


class Config:
    """Of a W&B run that takes everything."""

    def update(self, values, allow_val_change):
        pass


@pytest.mark.parametrize("failing", ["log", "finish"])
def test_a_failure_on_the_way_is_told_once_and_stops_nothing(tmp_path, monkeypatch, failing):
    class Run:
        def __init__(self):
            self.config = Config()

        def define_metric(self, *arguments, **options):
            pass

        def log(self, values):
            if failing == "log" and values["step"] == 2:
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


def test_sources_of_text_give_single_numbers_only():
    values = eval_values(EVAL_ROWS[0])
    own = {key: value for key, value in values.items() if "/by_source/" in key}
    assert len(own) == 2 * 7
    assert own["decode/ar/temperature_0/by_source/web/ar_loss"] == 4.0


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
        "import sys, pathlib, test_wandb_tracker\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "test_wandb_tracker.run(folder, 1, 3)\n"
        "test_wandb_tracker.run_files(folder, 1)\n"
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
