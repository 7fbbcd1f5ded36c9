"""`tidar-dashboard`: panels of keys that runs log, as W&B's own report, saved by W&B's own API."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hydra import compose, initialize_config_dir

from pipeline.dashboard import dashboard
from pipeline.training.trackers.dashboard import DashboardConfig, Panel
from pipeline.training.trackers.metrics import eval_values, step_values
from tidar_common.cli import config_dir
from tidar_common.cli import run as run_task
from tidar_common.config import parse


@pytest.fixture(scope="module")
def config() -> DashboardConfig:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return parse(DashboardConfig, compose("dashboard", ["entity=team"]), "")


def test_panels_draw_what_a_run_logs(config, trained_run):
    """Of a real run: its steps and evals, under the names that W&B has them by."""
    row = json.loads((trained_run / "metrics.jsonl").read_text().splitlines()[0])
    logged = {"decode/table", "decode/generation"}
    logged |= {f"decode/acceptance_temperature_{temperature}" for temperature in (0, 1)}
    logged |= set(step_values(StepRow(row)))
    for line in (trained_run / "evals" / "decode_speed.jsonl").read_text().splitlines():
        logged |= set(eval_values(json.loads(line)))
    keys = {key for section in config.sections for panel in section.panels for key in panel.keys}
    assert keys <= logged, sorted(keys - logged)
    assert len(keys) > 15


class StepRow:
    """A line of metrics.jsonl in place of the object that it was written from."""

    def __init__(self, row: dict) -> None:
        self.row = row

    def to_dict(self) -> dict:
        return self.row


def test_a_panel_is_one_or_the_other():
    with pytest.raises(ValueError, match="either y or media"):
        Panel("a", x="step", y=("train/loss",), media="decode/table")
    with pytest.raises(ValueError, match="x must be one of step, tokens"):
        Panel("a", x="epoch", y=("train/loss",))


@pytest.fixture
def tidar_dashboard(monkeypatch, capsys):
    def call(*overrides: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tidar-dashboard", "entity=team", *overrides])
        return run_task("dashboard", dashboard), *capsys.readouterr()

    return call


def test_a_dry_run_prints_the_panels_and_calls_nobody(tidar_dashboard, config):
    code, out, err = tidar_dashboard("dry_run=true")
    assert (code, err) == (0, "")
    assert "Gradient norm: train/grad_norm over step\n" in out
    panels = sum(len(section.panels) for section in config.sections)
    assert len(out.splitlines()) == panels + len(config.sections)


class Server:
    """Answers what W&B's API asks before and while a report is saved; keeps what was saved."""

    def __init__(self) -> None:
        self.saved: list[dict] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["Content-Length"]))
                try:
                    answer = outer.answer(json.loads(data))
                except ValueError:  # not GraphQL
                    answer = {}
                content = json.dumps({"data": answer}).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, request: dict) -> dict:
        query, values = request["query"], request.get("variables") or {}
        project = {
            "id": "UHJvamVjdDo3", "internalId": "7", "name": "tidar", "entityName": "team",
            "createdAt": "2026-01-01T00:00:00Z", "isBenchmark": False, "user": None,
        }  # fmt: skip
        if "upsertView" in query:
            self.saved.append(values)
            view = {"id": "Vmlldzox", "type": values["type"], "name": values["name"],
                    "displayName": values["displayName"], "description": "", "project": project,
                    "createdAt": "2026-01-01T00:00:00Z", "updatedAt": "2026-01-01T00:00:00Z",
                    "spec": values["spec"], "user": {}}  # fmt: skip
            return {"upsertView": {"view": view, "inserted": True}}
        if "models(" in query:
            page = {"hasNextPage": False, "endCursor": None}
            return {"models": {"pageInfo": page, "edges": [{"node": project, "cursor": "a"}]}}
        if "project(" in query:
            return {"project": project}
        viewer = {"id": "1", "entity": "team", "username": "user", "email": "", "flags": "{}",
                  "teams": {"edges": []}}  # fmt: skip
        return {"viewer": viewer}


def test_the_report_is_saved_by_the_library(tidar_dashboard, config, monkeypatch):
    pytest.importorskip("wandb_workspaces")
    server = Server()
    address = f"http://127.0.0.1:{server.http.server_port}"
    monkeypatch.setenv("WANDB_BASE_URL", address)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    code, out, err = tidar_dashboard()
    assert code == 0, err
    assert f"{address}/team/tidar/reports/" in out
    (saved,) = server.saved
    assert (saved["entityName"], saved["projectName"]) == ("team", "tidar")
    assert saved["displayName"] == "TiDAR training"
    for section in config.sections:
        for panel in section.panels:
            assert all(f'"{key}"' in saved["spec"] for key in panel.keys), panel.title


def test_without_a_login_it_is_one_line(tidar_dashboard, monkeypatch, tmp_path):
    pytest.importorskip("wandb_workspaces")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    code, out, err = tidar_dashboard()
    assert (code, out) == (2, "")
    assert err.startswith("error: entity: no report for team/tidar")
    assert err.count("\n") == 1


def test_without_the_package_it_says_what_to_install(tidar_dashboard, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = tidar_dashboard()
    assert code == 2
    assert "pip install -c constraints.txt -e '.[dashboard]'" in err
