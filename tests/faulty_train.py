"""`pipeline.train` with one fault built in, for tests: `TIDAR_TEST_FAULT=kind:number[:rank]`.

The fault strikes at the `number`-th time (from 1) that its place is passed, on one rank or all.
"""

import math
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from pipeline import train
from pipeline.checkpoint import files
from pipeline.checkpoint import write as checkpoints
from pipeline.data.source import SequenceSource
from pipeline.evals import decoding_runs
from pipeline.training import due, step

KIND, NUMBER, RANK = (os.environ["TIDAR_TEST_FAULT"] + "::").split(":")[:3]


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def ask_to_stop(*_: Any) -> None:
    """This process alone is asked, which all ranks have to follow."""
    os.kill(os.getpid(), signal.SIGTERM)


def hang(*_: Any) -> None:
    time.sleep(3600)


def fill_disk(*_: Any) -> None:
    """From here on no file can be written beyond some bytes, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


def fill_real_disk(*_: Any) -> None:
    """Leave some bytes on the disk of the folder `TIDAR_TEST_DISK`, and no more."""
    folder = os.environ["TIDAR_TEST_DISK"]
    with open(os.path.join(folder, "filler"), "wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(folder).free - 20_000)


def slow_down(*_: Any) -> None:
    """A step that takes longer than torchrun waits after a signal."""
    time.sleep(60)


def strike_before(owner: Any, name: str, strike: Callable[..., None]) -> None:
    """Call `strike` ahead of the NUMBER-th call of `owner.name`."""
    original, calls = getattr(owner, name), 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == int(NUMBER):
            strike()
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def scale_losses(factor: float) -> None:
    """Loss and gradients of the NUMBER-th micro-batch times `factor`, with RANK `on` those of all
    after it too. Of a NaN the loss that is told stays as it was."""
    original, calls = getattr(step, "head_loss"), 0  # noqa: B009

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        loss, sums = original(*args, **kwargs)
        spoilt = calls == int(NUMBER) or (RANK == "on" and calls > int(NUMBER))
        if not spoilt:
            return loss, sums
        return loss * factor, sums if math.isnan(factor) else sums * factor

    setattr(step, "head_loss", wrapped)  # noqa: B010 - mypy: step only imports it


PLACES: dict[str, Callable[[], None]] = {
    "nan": lambda: scale_losses(math.nan),
    "spike": lambda: scale_losses(50.0),
    "hang_data": lambda: strike_before(SequenceSource, "__getitem__", hang),
    "kill_data": lambda: strike_before(SequenceSource, "__getitem__", die),
    "kill_step": lambda: strike_before(step, "head_loss", die),
    "kill_writing": lambda: strike_before(files, "entry_of", die),
    "kill_before_rename": lambda: strike_before(checkpoints.Checkpoints, "_publish", die),
    "kill_after_rename": lambda: strike_before(checkpoints, "write_text_atomic", die),
    "kill_eval": lambda: strike_before(due, "evaluate_decode_speed", die),
    "stop_eval": lambda: strike_before(decoding_runs.Runner, "run", ask_to_stop),
    "slow_step": lambda: strike_before(step, "head_loss", slow_down),
    "real_full_disk": lambda: strike_before(files.FileWriter, "begin", fill_real_disk),
    "full_disk": lambda: strike_before(checkpoints.Checkpoints, "save", fill_disk),
}

if __name__ == "__main__":
    if RANK in ("", "on", os.environ.get("RANK", "0")):
        PLACES[KIND]()
    train.main()
    sys.exit(0)
