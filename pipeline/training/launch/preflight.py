"""The check before the first step: what would make a run fail, or differ, on one of many hosts.

Every rank looks at its own software, device, memory, disk, data and clock; rank 0 compares them,
prints one table, and names the hosts that stand out. Then all ranks together measure a collective
and go once forward and backward through the real model.
"""

import logging
import os
import platform
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.data.batch import make_batch, section_length
from pipeline.data.source import Source
from pipeline.distributed import World
from pipeline.planning.hardware import free_memory_bytes
from pipeline.training.engine import discard_step
from pipeline.training.settings import TrainSettings
from pipeline.training.step import StepInput, accumulate, count_globally
from tidar_common.errors import UserError
from tidar_common.files import sha256_of
from tidar_common.tables import Table

SAME = ("python", "torch", "deepspeed", "cuda", "device", "manifest")
"""What has to be equal on all ranks."""
CLOCK_SKEW_S = 5.0
"""Clocks further apart than this make logs and time limits wrong."""
REDUCED_BYTES = {"cuda": 256 << 20, "cpu": 4 << 20}
"""Size of the tensor whose all-reduce is timed, by kind of device."""
GIB = 1 << 30
MIN_FREE_DISK_BYTES = 1 * GIB


def wanted(choice: str, world: World) -> bool:
    """Whether to check: `auto` does on more than one node."""
    if choice == "auto":
        return world.size > int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    return choice == "true"


def check_hosts(
    settings: TrainSettings, source: Source, world: World, say: Callable[[str], None]
) -> float:
    """Compare what the ranks find; raises UserError on all of them naming hosts that stand out.

    Returns:
        float: the seconds it took.
    """
    started = time.perf_counter()
    world.barrier()
    reports = world.gather(look_around(settings, source, world))
    say(table(reports))
    problems = find_problems(reports)
    if problems:
        raise UserError(f"preflight: {'; '.join(problems)} (preflight=false skips this check)")
    return time.perf_counter() - started


def look_around(settings: TrainSettings, source: Source, world: World) -> dict[str, Any]:
    """What this rank sees: versions, device, memory, disk, data, clock."""
    import deepspeed

    facts: dict[str, Any] = {
        "rank": world.rank,
        "host": socket.gethostname(),
        "clock": time.time(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "cuda": torch.version.cuda or "none",
        "device": "cpu",
        "free memory GiB": (free_memory_bytes() or 0) / GIB,
        "problems": [],
    }
    if world.device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(world.device)
        facts["free memory GiB"] = torch.cuda.mem_get_info(world.device)[0] / GIB
    for name, look in (
        ("free disk GiB", lambda: free_disk_gib(settings.run_dir, world.rank)),
        ("manifest", lambda: sha256_of(settings.data_dir / "manifest.json")[:12]),
        ("shard", lambda: read_some(source, world)),
    ):
        try:
            facts[name] = look()
        except (OSError, UserError) as error:
            facts[name] = "failed"
            facts["problems"].append(f"{name}: {error}")
    return facts


def free_disk_gib(run_dir: Path, rank: int) -> float:
    """GiB free where checkpoints go, after a file could be written and removed there."""
    probe = run_dir / f".preflight-{rank}"
    probe.write_bytes(b"x")
    probe.unlink()
    free = shutil.disk_usage(run_dir).free
    if free < MIN_FREE_DISK_BYTES:
        raise UserError(f"{run_dir} has only {free / GIB:.2f} GiB left; free some space")
    return free / GIB


def read_some(source: Source, world: World) -> str:
    """Read a sequence out of a shard, another one on each rank."""
    count = source.epoch_sequences
    source[world.rank * count // world.size]
    return "ok"


def find_problems(reports: list[dict[str, Any]]) -> list[str]:
    """What rules out a start, each with the host it is about."""
    problems = [
        f"rank {report['rank']} on {report['host']}: {text}"
        for report in reports
        for text in report["problems"]
    ]
    for key in SAME:
        usual, _ = Counter(report[key] for report in reports).most_common(1)[0]
        problems += [
            f"rank {report['rank']} on {report['host']} has {key} {report[key]}, the others {usual}"
            for report in reports
            if report[key] not in (usual, "failed")
        ]
    for report in reports:
        skew_s = report["clock"] - reports[0]["clock"]
        if abs(skew_s) > CLOCK_SKEW_S:
            problems.append(
                f"the clock of {report['host']} (rank {report['rank']}) is {skew_s:+.1f} s from "
                "that of rank 0; let it be set by NTP"
            )
    return problems


def table(reports: list[dict[str, Any]]) -> str:
    """One line per rank."""
    columns = ["rank", "host", "python", "torch", "deepspeed", "cuda", "device",
               "free memory GiB", "free disk GiB", "manifest", "shard"]  # fmt: skip
    cells = []
    for report in reports:
        values = [report[column] for column in columns]
        cells.append([f"{v:.1f}" if isinstance(v, float) else str(v) for v in values])
    return Table(columns, cells, left=range(len(columns))).text()


def try_step(
    engine: Any,
    settings: TrainSettings,
    source: Source,
    world: World,
    say: Callable[[str], None],
    alone_share: float = 0.0,
) -> float:
    """Time an all-reduce, and a forward and backward of a real batch that is then dropped.

    Weights, optimizer state and the place in the data stay as they were. `alone_share` as in
    training (`step_batches`).

    Returns:
        float: the seconds that all of it took.
    """
    began = time.perf_counter()
    seconds, bandwidth = time_all_reduce(world)
    drafts = settings.objective.drafts
    length, coverage = source.manifest.sequence_length, source.coverage
    slots = section_length(length, coverage, source.block_slots) if drafts else 0
    first = world.rank * settings.micro_batch_size
    sequences = [source[first + number] for number in range(settings.micro_batch_size)]
    mask_id, causal = source.manifest.tokenizer.mask_id, engine.module.config.causal_slots
    batches = [make_batch(sequences, mask_id, slots, alone_share=alone_share, causal_slots=causal)]
    step = StepInput(batches, settings.objective.at(0), settings.attention)
    counts = count_globally(step, world)
    started = time.perf_counter()
    micro_steps = engine.micro_steps
    engine.set_gradient_accumulation_boundary(True)
    accumulate(engine, step, counts, world)
    with quiet_deepspeed():  # which would warn of the gradients that this step drops
        discard_step(engine)
    engine._is_gradient_accumulation_boundary = None  # by the count again
    engine.micro_steps = micro_steps
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    say(
        f"preflight: all-reduce of {REDUCED_BYTES[world.device.type] / 2**20:.0f} MiB in "
        f"{1e3 * seconds:.1f} ms ({bandwidth:.2f} GB/s), one forward and backward in "
        f"{time.perf_counter() - started:.2f} s"
    )
    return time.perf_counter() - began


@contextmanager
def quiet_deepspeed() -> Iterator[None]:
    """Within the context DeepSpeed's own log has errors only."""
    from deepspeed.utils import logger

    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def time_all_reduce(world: World) -> tuple[float, float]:
    """Seconds of an all-reduce on the device, and its bus bandwidth in GB/s (as nccl-tests)."""
    data = torch.zeros(REDUCED_BYTES[world.device.type] // 4, device=world.device)
    dist.all_reduce(data)  # sets up connections
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    dist.all_reduce(data)
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    moved = data.numel() * 4 * 2 * (world.size - 1) / world.size
    return seconds, moved / seconds / 1e9
