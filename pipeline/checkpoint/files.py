"""The files of a checkpoint: written and hashed, listed in `files.json`, checked, and read without
running what may be pickled in them. What was written is what is loaded.
"""

import copy
import json
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tidar_common.config import first_line
from tidar_common.errors import UserError
from tidar_common.files import fsync_path, sha256_of, write_text_atomic

FILE_LIST = "files.json"
MAX_LIST_BYTES = 64 << 20
"""A list of some hundred thousand files; what is larger is no list."""
FileEntry = dict[str, Any]
"""`bytes` and `sha256` of a file."""
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.Size, torch.device)


def entry_of(path: Path) -> FileEntry:
    """Bring a written file to disk and describe it."""
    fsync_path(path)
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def write_file_list(folder: Path, known: Mapping[str, FileEntry] | None = None) -> int:
    """List every file under `folder` with its size and SHA-256, after all are on disk.

    Args:
        folder: of the checkpoint.
        known: entries of files, by path in `folder`, that other ranks wrote and hashed; their
            sizes are checked, the rest is hashed here.

    Returns:
        The bytes of all files.

    Raises:
        OSError: when a known file is not there with its size.
    """
    known = known or {}
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != FILE_LIST):
        name = path.relative_to(folder).as_posix()
        files[name] = known[name] if name in known else entry_of(path)
    for name, entry in known.items():
        size = (folder / name).stat().st_size
        if size != entry["bytes"]:
            raise OSError(f"{folder / name}: has {size} bytes instead of {entry['bytes']}")
    write_text_atomic(folder / FILE_LIST, json.dumps({"files": files}, indent=1) + "\n")
    fsync_path(folder)
    return sum(int(entry["bytes"]) for entry in files.values())


def verify_file_list(folder: Path) -> None:
    """Check every file of the list; raises UserError naming the first that is missing or differs.

    Sizes are compared before hashes, so that truncation is found without reading everything.
    """
    listed = _read_list(folder)
    for name, (size, _) in listed.items():
        file = folder / name
        on_disk = file.stat().st_size if file.is_file() else None
        if on_disk != size:
            what = "is missing" if on_disk is None else f"has {on_disk} bytes instead of {size}"
            raise UserError(f"{file}: {what}; use another checkpoint")
    for name, (_, digest) in listed.items():
        if sha256_of(folder / name) != digest:
            raise UserError(f"{folder / name}: differs from what was saved; use another checkpoint")


def _read_list(folder: Path) -> dict[str, tuple[int, str]]:
    path = folder / FILE_LIST
    try:
        if path.stat().st_size > MAX_LIST_BYTES:
            raise ValueError(f"more than {MAX_LIST_BYTES} bytes")
        files = json.loads(path.read_text())["files"]
        listed = {name: (int(f["bytes"]), str(f["sha256"])) for name, f in files.items()}
        for name in listed:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError(f"{name!r} lies outside of the checkpoint")
        if not listed:
            raise ValueError("it lists nothing")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: missing or damaged, the checkpoint is not complete") from error
    return listed


def allowed_classes() -> list[Any]:
    """The classes, all without side effects, that DeepSpeed pickles beside tensors."""
    if not torch.cuda.is_available():  # DeepSpeed looks for an accelerator when it is imported
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address, set]


def load_checked(
    path: Path, *, map_location: Any = "cpu", mmap: bool = False, tensors_only: bool = False
) -> Any:
    """torch.load with `weights_only`, and DeepSpeed's few plain classes allowed, unless
    `tensors_only`: then DeepSpeed is not imported, either.

    Raises:
        UserError: when the file holds anything else, or cannot be read.
    """
    try:
        with torch.serialization.safe_globals([] if tensors_only else allowed_classes()):
            return torch.load(path, map_location=map_location, mmap=mmap, weights_only=True)
    except Exception as error:
        reason = first_line(error)
        raise UserError(f"{path}: is no checkpoint file that can be loaded ({reason})") from error


class FileWriter:
    """Writes DeepSpeed's files, hashed on every rank, at once or later; in place of DeepSpeed's own
    checkpoint engine. One checkpoint at a time: `begin`, DeepSpeed's saves, then `finish`.

    An error while writing is kept and not raised: DeepSpeed has barriers after its files, in which
    the other ranks would wait for ever.
    """

    def __init__(self, asynchronous: bool) -> None:
        self.name = "FileWriter"
        self.asynchronous = asynchronous
        self.error: str | None = None
        self.files: dict[str, FileEntry] = {}
        """By file name: what this rank wrote."""
        self.seconds = 0.0
        """Spent in writing and hashing, in the background or not."""
        self._waiting: list[tuple[Any, Path]] = []
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        self.error, self.files, self.seconds, self._waiting = None, {}, 0.0, []

    def launch(self) -> None:
        """Write what was taken a snapshot of, in a thread."""
        if self.asynchronous:
            waiting, self._waiting = self._waiting, []
            self._thread = threading.Thread(
                target=self._write_all, args=(waiting,), name="tidar-checkpoint", daemon=True
            )
            self._thread.start()

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def finish(self) -> None:
        """Wait until everything is written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write_all(self, waiting: list[tuple[Any, Path]]) -> None:
        while waiting:
            state, path = waiting.pop(0)
            self._write(state, path)
            del state  # its snapshot is not needed any more

    def _write(self, state: Any, path: Path) -> None:
        started = time.perf_counter()
        try:
            if self.error is None:
                torch.save(state, path)
                self.files[path.name] = entry_of(path)
        except Exception as error:  # torch.save raises RuntimeError on a full disk
            self.error = f"{path}: {type(error).__name__}: {first_line(error)}"
        self.seconds += time.perf_counter() - started

    # What DeepSpeed calls.

    def save(self, state_dict: Any, path: str) -> None:
        if not self.asynchronous:
            self._write(state_dict, Path(path))
            return
        try:
            self._waiting.append((snapshot(state_dict), Path(path)))
        except Exception as error:  # no host memory for the copy, for example
            self.error = f"{path}: {type(error).__name__}: {first_line(error)}"

    def load(self, path: str, map_location: Any = None) -> Any:
        return load_checked(Path(path), map_location=map_location)

    def create(self, info: Any) -> None:
        """Nothing to prepare."""

    def commit(self, info: Any) -> bool:
        return True

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        Path(path).mkdir(parents=True, exist_ok=exist_ok)

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        return dp_rank == 0

    def is_decoupled(self) -> bool:
        return False

    def set_commit_info(self, info: Any) -> None:
        """Only for engines that DeepSpeed itself commits."""

    def get_commit_info(self) -> None:
        return None

    def cleanup(self) -> None:
        self.finish()

    def preserves_storage_sharing(self) -> bool:
        return True


def snapshot(value: Any) -> Any:
    """A copy in host memory that later steps do not change.

    Views are copied alone, without the storage behind them; tensors that are the same memory in
    `value` stay the same in the copy.
    """
    seen: dict[Any, Tensor] = {}

    def copied(tensor: Tensor) -> Tensor:
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() == 0 or key not in seen:
            seen[key] = tensor.detach().to("cpu", copy=True)
        return seen[key]

    def walk(item: Any) -> Any:
        if isinstance(item, Tensor):
            return copied(item)
        if isinstance(item, dict) and type(item).__module__ in ("builtins", "collections"):
            new = copy.copy(item)
            for key in item:
                new[key] = walk(item[key])
            return new
        if type(item) in (list, tuple, set):
            return type(item)(walk(entry) for entry in item)
        return item if isinstance(item, PLAIN) else copy.deepcopy(item)

    return walk(value)


def install(engine: Any, asynchronous: bool) -> FileWriter:
    """Make `engine` write through a FileWriter, and nothing else; returns it."""
    writer = FileWriter(asynchronous)
    engine.checkpoint_engine = writer
    # It copies its converters beside checkpoints, which a full disk makes fail on rank 0 alone.
    # `tidar-export` does what they do, with a checked result.
    engine._copy_recovery_script = _copy_nothing
    return writer


def _copy_nothing(save_path: str) -> None:
    """Stands in for DeepSpeed's copying of its converters."""
