"""Functions run in several gloo processes, as torchrun would start them."""

import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from commands import FORKSERVER

TIMEOUT_S = 500


def run_workers(function: Callable[..., Any], world_size: int, folder: Path, *args: Any) -> list:
    """Call `function(world, *args)` on `world_size` gloo ranks; their results in order of rank.

    `function` must be importable by name. An exception in any rank fails the test with its
    traceback; ranks that hang are ended after `TIMEOUT_S`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        FORKSERVER.Process(target=_work, args=(function, rank, world_size, port, folder, args))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TIMEOUT_S)
        if process.is_alive():
            for other in processes:
                other.kill()
            raise AssertionError(f"ranks still running after {TIMEOUT_S} s")
    errors = [path.read_text() for path in sorted(folder.glob("error-*.txt"))]
    assert not errors, "\n".join(errors)
    assert [process.exitcode for process in processes] == [0] * world_size
    return [
        torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(world_size)
    ]


def _work(function, rank, world_size, port, folder, args) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
    )
    torch.set_num_threads(1)
    from pipeline.distributed import joined_world

    try:
        with joined_world() as world:
            torch.save(function(world, *args), folder / f"result-{rank}.pt")
    except BaseException:
        (folder / f"error-{rank}.txt").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise
