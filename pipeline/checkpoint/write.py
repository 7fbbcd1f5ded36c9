"""Checkpoints that are either complete on every rank or not there at all.

Layout of `checkpoints/step-00000100/`: DeepSpeed's own files, `state.json` (progress and what the
run was), `model.json` (shape), `config.yaml`, the tokenizer, and `files.json`, the list of all
files with size and SHA-256, written last. The folder gets its name by a rename when it is complete;
only then `checkpoints/latest` names it.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from pipeline.checkpoint.files import FileWriter, install, verify_file_list, write_file_list
from pipeline.checkpoint.reshape import load_reshaped
from pipeline.checkpoint.retention import (
    CheckpointConfig,
    complete_checkpoints,
    delete_left,
    delete_old,
    discard,
)
from pipeline.data.order import TrainState
from pipeline.distributed import World
from pipeline.model.config import ModelConfig
from tidar_common.errors import UserError
from tidar_common.files import fsync_path, write_text_atomic

UNCHANGED_SPACE = 1.05
"""A checkpoint is as large as the one before it, but for rounding and lists."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that became visible."""

    step: int
    name: str
    bytes: int
    """Of all its files."""
    held_s: float
    """Seconds that training stood still for it."""
    total_s: float
    """Seconds from its start until it was visible."""
    undeleted: tuple[str, ...] = ()
    """A line for each file of older ones that could not be deleted; the next save tries again."""


@dataclass(frozen=True)
class Failed:
    """A checkpoint that could not be written; nothing of it is left."""

    step: int
    message: str


@dataclass
class _Begun:
    """A checkpoint that is being written."""

    step: int
    content: dict[str, Any]
    started: float
    held_s: float = 0.0


class Checkpoints:
    """The checkpoints of one run directory; all ranks call each method together.

    Args:
        run_dir: of the run.
        world: the ranks.
        config: when, how, and how many.
        identity: what a resume must agree with.
        topology: how this run's state is partitioned; a resume may change it.
        write_extra: `write_extra(folder)` adds the files that make a checkpoint loadable by itself
            (model shape, tokenizer, config); rank 0 calls it.
        schedule: how the run trains from here on; a resume may change it, and is told.
    """

    def __init__(
        self,
        run_dir: Path,
        world: World,
        config: CheckpointConfig,
        identity: dict[str, Any],
        topology: dict[str, Any],
        write_extra: Callable[[Path], None],
        schedule: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = run_dir / "checkpoints"
        self.world = world
        self.config = config
        # As they come back from state.json.
        self.identity = json.loads(json.dumps(identity))
        self.topology = json.loads(json.dumps(topology))
        self.schedule = json.loads(json.dumps(schedule or {}))
        self.write_extra = write_extra
        self.load_s = 0.0
        """Seconds that the last `restore` took, checking all files included."""
        self._writer: FileWriter | None = None
        self._begun: _Begun | None = None

    @property
    def in_flight(self) -> bool:
        """Whether a checkpoint is being written in the background; the same on all ranks."""
        return self._begun is not None

    def save(self, engine: Any, state: TrainState) -> Saved | Failed | None:
        """Save; None when it is still being written, for `poll` to tell the outcome."""
        assert self._begun is None, "the save before this one has not been waited for"
        started = time.perf_counter()
        problem = self.world.from_main(self._prepare(state.step) if self.world.is_main else None)
        if problem is not None:
            return Failed(state.step, problem)
        content = {**state.to_dict(), "identity": self.identity, "topology": self.topology,
                   "schedule": self.schedule}  # fmt: skip
        content["world_size"] = self.world.size
        self._begun = _Begun(state.step, content, started)
        if self._writer is None:
            self._writer = install(engine, self.config.asynchronous)
        self._writer.begin()
        engine.save_checkpoint(
            str(self.folder), tag=self._temporary(state.step).name, save_latest=False
        )
        self._writer.launch()
        self._begun.held_s = time.perf_counter() - started
        return None if self.config.asynchronous else self.poll(wait=True)

    def poll(self, *, wait: bool) -> Saved | Failed | None:
        """The outcome of the save in flight, or None while any rank still writes."""
        if self._begun is None:
            return None
        begun, writer = self._begun, self._writer
        assert writer is not None
        resumed = time.perf_counter()
        if wait:
            writer.finish()
        reports = self.world.gather((writer.busy, writer.error, writer.files))
        if any(busy for busy, _, _ in reports):
            return None
        writer.finish()
        self._begun = None
        errors = [error for _, error, _ in reports if error is not None]
        files = {name: entry for _, _, entries in reports for name, entry in entries.items()}
        outcome = None
        if self.world.is_main:
            outcome = self._complete(begun, files, errors)
        kind, value = self.world.from_main(outcome)
        if kind == "failed":
            return Failed(begun.step, value)
        now, (size, undeleted) = time.perf_counter(), value
        return Saved(
            step=begun.step,
            name=self._final(begun.step).name,
            bytes=size,
            held_s=begun.held_s + now - resumed,
            total_s=now - begun.started,
            undeleted=undeleted,
        )

    def restore(
        self, engine: Any, say: Callable[[str], None]
    ) -> tuple[TrainState | None, dict[str, Any]]:
        """Load the newest undamaged checkpoint into `engine`.

        Returns:
            The progress saved in it, None when there is no checkpoint at all; and what there is
            to tell: `damaged` (by name, why), `changed` (topology, schedule and allowed keys) and
            `name`.

        Raises:
            UserError: when all are damaged, or the run's identity differs from the checkpoint's.
        """
        started = time.perf_counter()
        chosen = self.world.from_main(self._choose(say) if self.world.is_main else None)
        name, damaged, problem = chosen
        if problem is not None:
            raise UserError(problem)
        if name is None:
            return None, {}
        path = self.folder / name
        content = read_state(path)
        changed = check_identity(
            name, content["identity"], self.identity, self.config.allow_changes
        )
        reshaped = differences(content["topology"], self.topology)
        if reshaped:
            load_reshaped(engine, path)
        else:
            self._writer = install(engine, self.config.asynchronous)
            loaded, _ = engine.load_checkpoint(str(self.folder), tag=name)
            if loaded is None:
                raise UserError(f"{path}: DeepSpeed loaded nothing from it; delete it")
        self.load_s = time.perf_counter() - started
        # Checkpoints of before do not know theirs.
        trained = differences(content.get("schedule", self.schedule), self.schedule)
        changes = {**changed, **reshaped, **trained}
        return TrainState.from_dict(content), {"name": name, "damaged": damaged, "changed": changes}

    def newest(self) -> str | None:
        """Name of the newest checkpoint, whether damaged or not."""
        complete = complete_checkpoints(self.folder) if self.world.is_main else []
        return self.world.from_main(complete[-1].name if complete else None)

    def _choose(self, say: Callable[[str], None]) -> tuple[str | None, dict[str, str], str | None]:
        damaged: dict[str, str] = {}
        for path in reversed(complete_checkpoints(self.folder)):
            try:
                verify_file_list(path)
            except UserError as error:
                damaged[path.name] = str(error)
                say(f"warning: checkpoint {path.name} is damaged and left alone: {error}")
                continue
            return path.name, damaged, None
        if damaged:
            problem = (
                f"{self.folder}: all checkpoints are damaged; restore one or use a new run_dir"
            )
            return None, damaged, problem
        return None, damaged, None

    def _temporary(self, step: int) -> Path:
        return self.folder / f".writing-step-{step:08d}"

    def _final(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _prepare(self, step: int) -> str | None:
        """Make the temporary folder; returns why that cannot be, if so."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob(".writing-*"):
                discard(left)
            delete_left(self.folder)  # what stays is told when the checkpoint is complete
            self._temporary(step).mkdir()
            complete = complete_checkpoints(self.folder)
            if complete:
                size = sum(f.stat().st_size for f in complete[-1].rglob("*") if f.is_file())
                free = shutil.disk_usage(self.folder).free
                if free < size * UNCHANGED_SPACE:
                    self._temporary(step).rmdir()
                    return (
                        f"{self.folder}: {free:,} bytes are free and a checkpoint takes {size:,}; "
                        "free some space or lower checkpoint.keep_last"
                    )
        except OSError as error:
            return f"{self.folder}: cannot be written ({error})"
        return None

    def _complete(
        self, begun: _Begun, files: dict[str, dict[str, Any]], errors: list[str]
    ) -> tuple[str, Any]:
        """Rank 0, when all ranks have written: list, rename, point `latest` to it, delete old."""
        temporary = self._temporary(begun.step)
        try:
            if errors:
                raise OSError(errors[0])
            self.write_extra(temporary)
            (temporary / "state.json").write_text(json.dumps(begun.content, indent=2) + "\n")
            size = write_file_list(temporary, files)
            self._publish(temporary, self._final(begun.step))
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            return "failed", str(error)
        return "saved", (size, tuple(delete_old(self.folder, self.config)))

    def _publish(self, temporary: Path, final: Path) -> None:
        if final.exists():  # a damaged one of the same step, which restore passed over
            discard(final)
        os.rename(temporary, final)
        fsync_path(self.folder)
        write_text_atomic(self.folder / "latest", final.name + "\n")


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The progress and the identity that a checkpoint's `state.json` holds."""
    content: dict[str, Any] = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    return content


def check_identity(
    name: str, saved: Mapping[str, Any], asked: Mapping[str, Any], allowed: Collection[str]
) -> dict[str, tuple[Any, Any]]:
    """(saved, asked) of what differs between the run that wrote checkpoint `name` and this one.

    Raises:
        UserError: where a key differs that is not `allowed` to.
    """
    asked = json.loads(json.dumps(asked))  # as it comes back from state.json
    changed = differences(completed(saved, asked), asked)
    refuse_changes(name, changed, allowed)
    return changed


def completed(saved: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """A saved identity with the keys of `asked` that are younger than it, as runs then were."""
    shape = {f"model.{f.name}": f.default for f in fields(ModelConfig) if f.default != MISSING}
    before = json.loads(json.dumps({**shape, "freeze_base": False}))
    return {**{key: value for key, value in before.items() if key in asked}, **saved}


def differences(saved: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """(saved, asked) of every key that is not the same in both."""
    return {
        key: (saved.get(key), asked.get(key))
        for key in [*asked, *(key for key in saved if key not in asked)]
        if saved.get(key) != asked.get(key)
    }


def refuse_changes(
    name: str, changed: Mapping[str, tuple[Any, Any]], allowed: Collection[str]
) -> None:
    """Raise UserError with every difference that is not among the keys `allowed`."""
    refused = {key: pair for key, pair in changed.items() if key not in allowed}
    if not refused:
        return
    shown = "; ".join(
        f"{key}={was}, this run has {key}={now}" for key, (was, now) in refused.items()
    )
    keys = ",".join(f"'{key}'" if " " in key else key for key in refused)
    raise UserError(
        f"run_dir: checkpoint {name} was made with {shown}; use the same value, start in a new "
        f"run_dir, or continue all the same with checkpoint.allow_changes=[{keys}]"
    )
