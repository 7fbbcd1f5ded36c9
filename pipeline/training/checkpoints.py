"""Checkpoints that are either complete on every rank or not there at all.

Layout of `checkpoints/step-00000100/`: DeepSpeed's own files, `state.json` (progress and what the
run was), `model.json` (shape), `config.yaml`, the tokenizer, and `files.json`, the list of all
files with size and SHA-256, written last. The folder gets its name by a rename when it is complete;
only then `checkpoints/latest` names it.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.files import fsync_folder, write_text_atomic
from pipeline.model.checkpoint_files import verify_file_list, write_file_list
from pipeline.distributed import World
from pipeline.training.state import TrainState

DEEPSPEED_SCRIPTS = ("zero_to_fp32.py", "zero_to_torch.py")
"""Copies of its converters that DeepSpeed leaves beside checkpoints; `tidar-export` does the same
with a checked result."""


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 1000
    """Optimizer steps between checkpoints; one is always saved at the end."""
    keep_last: int = 2
    """Checkpoints kept; older ones are deleted after a newer one is complete. 0 keeps all."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be at least 1, got {self.every}")
        if self.keep_last < 0:
            raise ValueError(f"keep_last must be 0 or more, got {self.keep_last}")


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, run_dir: Path, world: World, keep_last: int) -> None:
        self.folder = run_dir / "checkpoints"
        self.world = world
        self.keep_last = keep_last

    def save(
        self,
        engine: Any,
        state: TrainState,
        identity: dict[str, Any],
        write_extra: Callable[[Path], None],
    ) -> str:
        """Save on all ranks together; returns the checkpoint's name.

        `write_extra(folder)` adds the files that make it loadable by itself (model shape,
        tokenizer, config); rank 0 calls it. `identity` is what a resume must agree with.
        """
        name = f"step-{state.step:08d}"
        temporary = self.folder / f".writing-{name}"
        if self.world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.world.barrier()
        engine.save_checkpoint(str(self.folder), tag=temporary.name, save_latest=False)
        self.world.barrier()
        if self.world.is_main:
            write_extra(temporary)
            content = {**state.to_dict(), "identity": identity, "world_size": self.world.size}
            (temporary / "state.json").write_text(json.dumps(content, indent=2) + "\n")
            write_file_list(temporary)
            self._publish(temporary, name)
            for script in DEEPSPEED_SCRIPTS:
                (self.folder / script).unlink(missing_ok=True)
        self.world.barrier()
        return name

    def restore(
        self, engine: Any, identity: dict[str, Any], say: Callable[[str], None]
    ) -> TrainState | None:
        """Load the newest undamaged checkpoint into `engine`; None when there is none at all.

        Raises:
            UserError: when all are damaged, or the run's identity differs from the checkpoint's.
        """
        name = self.world.from_main(self._choose(say) if self.world.is_main else None)
        if isinstance(name, UserError):
            raise name
        if name is None:
            return None
        content = json.loads((self.folder / name / "state.json").read_text())
        self._check_identity(name, content, identity)
        path, _ = engine.load_checkpoint(str(self.folder), tag=name)
        if path is None:
            raise UserError(f"{self.folder / name}: DeepSpeed loaded nothing from it; delete it")
        return TrainState.from_dict(content)

    def _choose(self, say: Callable[[str], None]) -> str | UserError | None:
        names = sorted((p.name for p in self.folder.glob("step-*") if p.is_dir()), reverse=True)
        for name in names:
            try:
                verify_file_list(self.folder / name)
            except UserError as error:
                say(f"warning: checkpoint {name} is damaged and left alone: {error}")
                continue
            return name
        if names:
            return UserError(
                f"{self.folder}: all checkpoints are damaged; restore one or use a new run_dir"
            )
        return None

    def _check_identity(self, name: str, content: dict[str, Any], identity: dict[str, Any]) -> None:
        saved = {**content["identity"], "processes": content["world_size"]}
        asked = {**identity, "processes": self.world.size}
        for key, value in asked.items():
            if saved.get(key) != value:
                raise UserError(
                    f"run_dir: checkpoint {name} was made with {key}={saved.get(key)}, this run "
                    f"has {key}={value}; use the same value, or start in a new run_dir"
                )

    def _publish(self, temporary: Path, name: str) -> None:
        final = self.folder / name
        if final.exists():  # a damaged one of the same step, which restore passed over
            shutil.rmtree(final)
        os.rename(temporary, final)
        fsync_folder(self.folder)
        write_text_atomic(self.folder / "latest", name + "\n")
        if self.keep_last:
            complete = sorted(p for p in self.folder.glob("step-*") if p.is_dir())
            for old in complete[: -self.keep_last]:
                shutil.rmtree(old)
