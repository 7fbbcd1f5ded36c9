"""What DeepSpeed writes its checkpoint files with here: hashed on every rank, at once or later.

It takes the place of DeepSpeed's own checkpoint engine. An error while writing is kept and not
raised: DeepSpeed has barriers after its files, in which the other ranks would wait for ever.
"""

import copy
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoint.files import FileEntry, entry_of
from pipeline.checkpoint.safe_load import load_checked
from tidar_common.config import first_line

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.Size, torch.device)


class FileWriter:
    """The files of one checkpoint at a time; `begin`, DeepSpeed's saves, then `finish`."""

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
