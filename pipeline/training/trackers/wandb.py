"""The same numbers in Weights & Biases. W&B never stops a run: when it fails, it says so once."""

import json
import struct
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.data.order import TrainState
from pipeline.report.pictures import acceptance_map, generation
from pipeline.training.config import WandbConfig
from pipeline.training.moments import ROUTINE, Event, StepMetrics, Tracker
from pipeline.training.trackers.environment import describe_environment
from pipeline.training.trackers.metrics import eval_values, step_values
from tidar_common.files import write_text_atomic
from tidar_common.jsonlines import read_whole
from tidar_common.page import Section, page
from tidar_common.run_files import DECODE_SPEED, EXAMPLE

OVER_TOKENS = ("train/*", "decode/*")
OVER_STEPS = ("data/*", "system/*", "events/*")
"""The axis each group of panels has at first; both axes are in every row."""
TABLE = (
    "step", "method", "temperature", "block_size", "tokens_per_forward", "tokens_per_second",
    "speedup_over_ar", "conversion", "queries_per_forward", "seconds_per_decoding_forward",
    "exact_match_ar", "divergences", "largest_divergence_gap", "distinct_4grams",
    "peak_memory_bytes", "ar_loss", "diffusion_loss",
)  # fmt: skip
"""Columns of the decode-speed table."""
SOURCES_TABLE = (
    "ar_loss", "diffusion_loss", "expected_tokens_per_forward",
    "unigram_expected_tokens_per_forward", "bigram_expected_tokens_per_forward",
    "recurrent_expected_tokens_per_forward",
    "draft_calibration_error", "teacher_forced_acceptance", "teacher_forced_survival",
)  # fmt: skip
"""Columns of the table by source of the text, behind step, temperature and source."""


class Wandb(Tracker):
    """Mirrors steps and evals; a continued run continues the same W&B run."""

    def __init__(
        self,
        run_dir: Path,
        config: WandbConfig,
        resolved: dict[str, Any],
        say: Callable[[str], None],
        ranks: list[dict[str, str]],
    ) -> None:
        """`ranks`: where each process runs, by `environment.describe_rank`."""
        self.run_dir = run_dir
        self.config = config
        self.resolved = resolved
        self.say = say
        self.ranks = ranks
        self.run: Any = None
        self.tokens = 0

    def on_start(self, state: TrainState) -> None:
        self.tokens = state.tokens
        if self.config.mode != "disabled":
            self._guard("start", self._start)

    def on_step(self, metrics: StepMetrics) -> None:
        self.tokens = metrics.tokens
        self._log(step_values(metrics))

    def on_eval(self, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            self._log({"step": row["step"], "tokens": self.tokens} | eval_values(row))
        if rows and self.run is not None:
            self._guard("draw", lambda: self._log_pictures(rows[0]["step"]))

    def on_checkpoint(self, step: int, name: str) -> None:
        if self.config.checkpoints and self.run is not None:
            self._guard("record a checkpoint", lambda: self._log_checkpoint(step, name))

    def on_event(self, event: Event) -> None:
        """An alert for what somebody should know; numbers of every event beside the curves."""
        run = self.run
        if run is None:
            return
        kind = event["event"]
        if kind not in ROUTINE and self.config.alerts:
            title = f"{self.run_dir.name}: {kind.replace('_', ' ')}"
            self._guard("alert", lambda: run.alert(title=title, text=event["message"]))
        details = {k: v for k, v in event.items() if isinstance(v, int | float) and k != "step"}
        if details:
            named = {f"events/{kind}/{k}": v for k, v in details.items()}
            self._log({"step": event["step"]} | named)

    def on_end(self, state: TrainState, finished: bool) -> None:
        run = self.run
        if run is not None:
            self._guard("finish", run.finish)

    def _start(self) -> None:
        import wandb

        folder = self.run_dir / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        for file in folder.glob("offline-run-*/*.wandb"):
            cut_torn_record(file)
        self.run = wandb.init(
            id=run_id(folder),
            resume="allow",
            mode=self.config.mode,  # type: ignore[arg-type]
            dir=str(self.run_dir),
            project=self.config.project,
            entity=self.config.entity,
            name=self.config.name or self.run_dir.name,
            tags=list(self.config.tags),
            config=self.resolved,
            settings=wandb.Settings(silent=True, console="off"),
        )
        environment = describe_environment(self.ranks)
        self.run.config.update({"environment": environment}, allow_val_change=True)
        for axis in ("step", "tokens"):
            self.run.define_metric(axis, hidden=True)
        for axis, groups in (("tokens", OVER_TOKENS), ("step", OVER_STEPS)):
            for group in groups:
                self.run.define_metric(group, step_metric=axis)

    def _log_pictures(self, step: int) -> None:
        """The table of all evals so far, acceptance over training, and the last generation."""
        import wandb

        rows = read_whole(self.run_dir / DECODE_SPEED)
        table = [[row.get(column) for column in TABLE] for row in rows]
        values: dict[str, Any] = {"step": step, "tokens": self.tokens}
        values["decode/table"] = wandb.Table(columns=list(TABLE), data=table)
        sources = sources_table(rows)
        if sources:
            names: list[str | int] = ["step", "temperature", "source", *SOURCES_TABLE]
            values["decode/sources"] = wandb.Table(columns=names, data=sources)
        for temperature in sorted({row["temperature"] for row in rows}):
            of_it = [r for r in rows if (r["method"], r["temperature"]) == ("tidar", temperature)]
            body = acceptance_map(of_it)
            if body is not None:
                name = f"decode/acceptance_temperature_{temperature:g}"
                values[name] = wandb.Html(page("Acceptance", [Section("", body)]), inject=False)
        example = self.run_dir / EXAMPLE
        if example.is_file():
            content = json.loads(example.read_text(encoding="utf-8"))
            shown = page("Generation", [Section("", generation(content))])
            values["decode/generation"] = wandb.Html(shown, inject=False)
        self.run.log(values)

    def _log_checkpoint(self, step: int, name: str) -> None:
        import wandb

        folder = (self.run_dir / "checkpoints" / name).resolve()
        artifact = wandb.Artifact(
            f"checkpoint-{self.run.id}", type="checkpoint", metadata={"step": step}
        )
        artifact.add_reference(folder.as_uri(), name=name, checksum=False)
        self.run.log_artifact(artifact, aliases=["latest", name])

    def _log(self, values: dict[str, Any]) -> None:
        """A row of its own, with the axes in it. W&B's own step only counts rows: it drops what
        comes under a step that it has passed, as an eval made up after a restart does."""
        run = self.run
        if run is not None:
            self._guard("log", lambda: run.log(values))

    def _guard(self, what: str, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:
            self.run = None
            self.say(
                f"warning: W&B could not {what} ({error}); training goes on without it, "
                "metrics.jsonl has all numbers"
            )


def cut_torn_record(path: Path) -> None:
    """Cut off what a kill has left of an earlier start's last record: `wandb sync` stops at a file
    that ends in the middle of one, and leaves all files behind it.

    The file is a LevelDB log (github.com/google/leveldb, doc/log_format.md) behind a header of 7
    bytes: blocks of 32 KiB, in them pieces of records, each behind checksum, length and kind.
    """
    size, header, block, full, last = path.stat().st_size, 7, 1 << 15, 1, 4
    place = whole = header
    with path.open("r+b") as file:
        while place < size:
            room = block - place % block
            if room < header:  # too little for a piece: filled with zeros
                place += room
                continue
            file.seek(place)
            head = file.read(header)
            if len(head) < header:
                break
            _, length, kind = struct.unpack("<IHB", head)
            place += header + length
            if place > size or not full <= kind <= last:
                break
            if kind in (full, last):  # a whole record, or the end of one in several pieces
                whole = place
        if whole < size:
            file.truncate(whole)


def sources_table(rows: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Rows of `SOURCES_TABLE` of all evals, lists as text: a column has one type."""
    return [
        [row["step"], row["temperature"], source]
        + [json.dumps(v) if isinstance(v, list) else v for v in map(numbers.get, SOURCES_TABLE)]
        for row in rows
        if row["method"] == "ar"  # every method's row has the same
        for source, numbers in (row.get("by_source") or {}).items()
    ]


def run_id(folder: Path) -> str:
    """The W&B id of a run directory, made at its first start and kept in `wandb/run_id`."""
    path = folder / "run_id"
    if not path.exists():
        write_text_atomic(path, uuid.uuid4().hex[:12] + "\n")
    return path.read_text().strip()
