"""What can be known on a login node about a run that is to be submitted: no GPU, no ranks, seconds.

Each check returns a line for people, or raises UserError with the key and the remedy.
"""

import json
import os
import shutil
import socket
from collections.abc import Callable
from netrc import NetrcParseError, netrc
from pathlib import Path
from urllib.parse import urlparse

from data_prep.formats.manifest import ShardInfo
from pipeline.data.mix import MixedSource
from pipeline.data.remote import is_remote
from pipeline.model.base import open_base
from pipeline.planning.plan import GIB, Plan
from tidar_common.errors import UserError

WANDB_TIMEOUT_S = 3.0


def check_data(plan: Plan, data_dir: Path | None) -> str:
    """Every training and held-out shard of the manifest is there with its size; contents unread.

    With None the data is at a URL, of which planning has read the manifest.
    """
    train = plan.planned.train
    shards = [*train.manifest.train.shards, *train.manifest.heldout.shards]
    if data_dir is not None:
        check_files(data_dir, shards)
    sequences = train.steps * train.global_batch_size
    if train.mix:
        for one in train.mix:
            if not is_remote(str((train.data.mix or {})[one.name]["dir"])):
                own = one.manifest
                check_files(one.dir, [*own.train.shards, *own.heldout.shards])
        source = MixedSource(train.mix, train.manifest, train.seed, train.layout, train.data,
                             train.global_batch_size)  # fmt: skip
        return source.describe(sequences)
    epochs = sequences / max(train.manifest.train.sequences, 1)
    place = f"in {data_dir}" if data_dir else "at the URL, not looked at"
    return f"{len(shards)} shards {place}; the run reads them {epochs:.2f} times"


def check_files(data_dir: Path, shards: list[ShardInfo]) -> None:
    """Each shard is a file of the manifest's size; raises UserError with the first that is not."""
    for shard in shards:
        path = data_dir / shard.name
        if not path.is_file():
            raise UserError(f"data.dir: {path} is missing; run tidar-prepare again")
        if path.stat().st_size != shard.bytes:
            raise UserError(
                f"data.dir: {path} has {path.stat().st_size} bytes, the manifest says "
                f"{shard.bytes}; run tidar-prepare again, or with verify=true to see more"
            )


def check_init(init_from: str | None) -> str:
    """The weights to start from are a model that can be opened."""
    if init_from is None:
        return "weights are drawn from the seed"
    return f"weights from {open_base(init_from)[1]}"


def check_batch(plan: Plan) -> str:
    """Planning has refused a batch that does not divide; this says how it does."""
    train = plan.planned.train
    return (
        f"{train.global_batch_size} sequences = {train.micro_batch_size} x "
        f"{plan.accumulation_steps} accumulation steps x {plan.planned.cluster.processes} processes"
    )


def check_memory(plan: Plan) -> str:
    if plan.errors:
        raise UserError("; ".join(plan.errors))
    if plan.gpu.memory_gib is None:
        return f"{plan.memory.peak / GIB:.1f} GiB a process, not judged: cluster.gpu is unknown"
    return f"{plan.memory.peak / GIB:.1f} of {plan.gpu.memory_gib:g} GiB a GPU"


def check_disk(plan: Plan) -> str:
    """The run directory can be written, and its file system has room for the checkpoints."""
    run_dir = plan.planned.train.run_dir
    folder = run_dir
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"run_dir: {run_dir} cannot be written below {folder}; give another")
    needed = plan.checkpoint * plan.kept_checkpoints
    there = sum(f.stat().st_size for f in run_dir.glob("checkpoints/step-*/*") if f.is_file())
    free = shutil.disk_usage(folder).free
    if needed > free + there:
        raise UserError(
            f"run_dir: {needed / GIB:.1f} GiB of checkpoints do not fit into the {free / GIB:.1f} "
            f"GiB that are free at {folder}; set checkpoint.keep_last lower, or another run_dir"
        )
    return f"{needed / GIB:.1f} GiB of checkpoints, {free / GIB:,.1f} GiB free at {folder}"


def check_run_dir(plan: Plan) -> str:
    """Whether the run starts, goes on, or is done."""
    run_dir = plan.planned.train.run_dir
    latest = run_dir / "checkpoints" / "latest"
    if not latest.is_file():
        return f"{run_dir} is new"
    name = latest.read_text(encoding="utf-8").strip()
    state = run_dir / "checkpoints" / name / "state.json"
    try:
        step = int(json.loads(state.read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError) as error:
        return f"{run_dir} has {name}, whose state.json cannot be read ({error}); training decides"
    if step >= plan.planned.train.steps:
        raise UserError(
            f"steps: {run_dir} has all {step} steps already; give more steps or another run_dir"
        )
    return f"{run_dir} goes on after step {step}"


def check_wandb(plan: Plan) -> str:
    """Online needs a key and a server that answers; nodes may still see less than this machine."""
    mode = plan.planned.train.wandb.mode
    if mode != "online":
        return mode + (", upload later with wandb sync" if mode == "offline" else "")
    address = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    host, port = address.hostname or "", address.port or (80 if address.scheme == "http" else 443)
    if not os.environ.get("WANDB_API_KEY") and not netrc_has(host):
        raise UserError(
            f"wandb.mode: online, but there is no key for {host}; run wandb login, set "
            "WANDB_API_KEY, or wandb.mode=offline"
        )
    if not any(os.environ.get(name) for name in ("https_proxy", "HTTPS_PROXY", "all_proxy")):
        try:
            socket.create_connection((host, port), timeout=WANDB_TIMEOUT_S).close()
        except OSError as error:
            raise UserError(
                f"wandb.mode: online, but {host}:{port} does not answer ({error}); "
                "set wandb.mode=offline and upload later with wandb sync"
            ) from error
    return f"online, {host}"


def netrc_has(host: str) -> bool:
    """Whether `wandb login` has left a key, which it keeps in netrc."""
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc(path).authenticators(host) is not None
    except (OSError, NetrcParseError):
        return False


def run_checks(
    plan: Plan, data_dir: Path | None, init_from: str | None, say: Callable[[str], None]
) -> None:
    """All checks, each with its line; raises UserError with everything that is wrong."""
    checks: list[tuple[str, Callable[[], str]]] = [
        ("data", lambda: check_data(plan, data_dir)),
        ("weights", lambda: check_init(init_from)),
        ("batch", lambda: check_batch(plan)),
        ("memory", lambda: check_memory(plan)),
        ("run", lambda: check_run_dir(plan)),
        ("disk", lambda: check_disk(plan)),
        ("wandb", lambda: check_wandb(plan)),
    ]
    wrong = []
    for name, check in checks:
        try:
            say(f"  ok      {name:<8} {check()}")
        except UserError as error:
            wrong.append(str(error))
            say(f"  wrong   {name:<8} {error}")
    if wrong:
        raise UserError("; ".join(wrong))
