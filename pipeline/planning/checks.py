"""What can be known on a login node about a run that is to be submitted: no GPU, no ranks, seconds.

Each check returns a line for people, or raises UserError with the key and the remedy.
"""

import os
import shutil
import socket
from collections.abc import Callable
from netrc import NetrcParseError, netrc
from pathlib import Path
from urllib.parse import urlparse

import torch

from data_prep.tokenizers.load import load_tokenizer
from pipeline.checkpoint.write import check_identity, read_state
from pipeline.data.mix import MixedSource
from pipeline.data.place import is_mirror
from pipeline.planning.hardware import CPU
from pipeline.planning.plan import GIB, Plan
from pipeline.training.due import open_heldout
from pipeline.training.settings import run_identity
from pipeline.training.setup import model_config, open_sequences, open_start, shards_left_out
from tidar_common.errors import UserError
from tidar_common.run_files import newest_checkpoint

WANDB_TIMEOUT_S = 3.0


def check_data(plan: Plan) -> str:
    """All shards that the run reads are there with their sizes, and the evals find what they need;
    of the contents only some held-out sequences are read, and nothing at a URL."""
    train = plan.planned.train
    skipped = "".join(f"; {line}" for line in shards_left_out(train))
    source = open_sequences(train)
    at_url = is_mirror(train.data_dir)
    if not at_url:
        open_heldout(train, model_config(train))
        load_tokenizer(train.data_dir)
    if isinstance(source, MixedSource):
        return source.describe(train.steps * train.global_batch_size) + skipped
    place = "at the URL, not looked at" if at_url else f"in {train.data_dir}"
    count = sum(len(split.shards) for split in train.manifest.splits.values())
    return f"{count} shards {place}; the run reads them {plan.epochs:.2f} times{skipped}"


def check_init(plan: Plan) -> str:
    """The weights to start from are those of a model of this shape."""
    train = plan.planned.train
    source = open_start(train, model_config(train), verify=False)
    return "weights are drawn from the seed" if source is None else f"weights from {source}"


def check_batch(plan: Plan) -> str:
    """Planning has refused a batch that does not divide; this says how it does."""
    train = plan.planned.train
    if plan.gpu.name == CPU:
        train.check_device(torch.device("cpu"))
    return (
        f"{train.global_batch_size} sequences = {train.micro_batch_size} x "
        f"{plan.accumulation_steps} accumulation steps x {plan.planned.cluster.processes} processes"
    )


def check_memory(plan: Plan) -> str:
    if plan.errors:
        raise UserError("; ".join(plan.errors))
    if plan.gpu.memory_gib is None:
        return f"{plan.memory.peak / GIB:.1f} GiB a process, not judged: cluster.gpu is unknown"
    unit = "process" if plan.gpu.name == CPU else "GPU"
    return f"{plan.memory.peak / GIB:.1f} of {plan.gpu.memory_gib:.4g} GiB a {unit}"


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
            f"GiB that are free at {folder}; set checkpoint.keep_last lower, keep_every higher, or "
            "another run_dir"
        )
    return f"{needed / GIB:.1f} GiB of checkpoints, {free / GIB:,.1f} GiB free at {folder}"


def check_run_dir(plan: Plan) -> str:
    """Whether the run starts, goes on as the same run, or is done."""
    train = plan.planned.train
    run_dir, name = train.run_dir, newest_checkpoint(train.run_dir)
    if name is None:
        return f"{run_dir} is new"
    try:
        state = read_state(run_dir / "checkpoints" / name)
        step, saved = int(state["step"]), state["identity"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{run_dir} has {name}, whose state.json cannot be read ({error}); training decides"
    identity = run_identity(train, model_config(train))
    check_identity(name, saved, identity, train.checkpoint.allow_changes)
    if step >= train.steps:
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


def run_checks(plan: Plan, say: Callable[[str], None]) -> None:
    """All checks, each with its line; raises UserError with everything that is wrong."""
    checks: list[tuple[str, Callable[[], str]]] = [
        ("data", lambda: check_data(plan)),
        ("weights", lambda: check_init(plan)),
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
    for text in plan.warnings:
        say(f"  note    {text}")
    if wrong:
        raise UserError("; ".join(wrong))
