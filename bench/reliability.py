"""Kills, damaged files and bad inputs that a run survives, and what its checkpoints cost.

`python -m bench.reliability` takes minutes and is not part of `python -m bench`.
"""

import argparse
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.options import add_options, given_options
from bench.results import RESULTS, Outcome, write
from pipeline.checkpoint.files import FILE_LIST, load_checked, verify_file_list
from pipeline.report.compare import compare, describe
from tests.commands import ROOT, SMALL_RUN, command, prepare_small
from tidar_common.errors import UserError
from tidar_common.jsonlines import read_whole
from tidar_common.run_files import DECODE_SPEED, EVENTS, newest_checkpoint

RUN = (
    *SMALL_RUN, "steps=90", "checkpoint.every=3", "evals.decode_speed.every=10",
    "evals.decode_speed.prompts=2", "evals.decode_speed.max_new_tokens=8",
    "evals.decode_speed.score_sequences=2", "wandb.mode=disabled",
)  # fmt: skip
KILLS = (
    ("kill_data", 4, 80), ("kill_step", 1, 30), ("kill_writing", 1, 3),
    ("kill_before_rename", 1, 2), ("kill_after_rename", 1, 2), ("kill_eval", 1, 1),
)  # fmt: skip
"""Where SIGKILL strikes, and the least and the greatest number of the call it strikes at, those in
a step over all ranks."""
ON_RANK_0 = ("kill_before_rename", "kill_after_rename")
"""What only rank 0 does."""
PER_STEP = ("kill_data", "kill_step")
SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT")
DAMAGE = ("flipped", "truncated", "emptied", "deleted")


@dataclass(frozen=True)
class Options:
    kills: int = 20
    """SIGKILLs in one run, at places in turn and at random moments there."""
    seed: int = 0
    """Of the moments."""
    processes: int = 2
    """Ranks; above 1 under torchrun."""
    parameters_m: int = 24
    """Millions of parameters of the model whose saving is timed."""


def launch(
    module: str, data_dir: Path, run_dir: Path, options: Options, *overrides: str, fault: str = ""
) -> subprocess.Popen[str]:
    values = [f"data.dir={data_dir}", f"run_dir={run_dir}", *RUN, *overrides]
    processes = options.processes if options.processes > 1 else None
    return subprocess.Popen(
        command(module, *values, processes=processes),
        cwd=ROOT, env={**os.environ, "TIDAR_TEST_FAULT": fault}, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> None:
    """Wait for a run that has to end well."""
    _, errors = process.communicate(timeout=600)
    if process.returncode != 0:
        raise RuntimeError(f"a run without a fault ended with {process.returncode}: {errors}")


def lines_of(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def survive_kills(data_dir: Path, folder: Path, options: Options) -> dict[str, Any]:
    """Kill one run again and again, continue it, and compare it with a run left alone."""
    straight, killed = folder / "straight", folder / "killed"
    finish(launch("pipeline.train", data_dir, straight, options))
    rng = random.Random(options.seed)
    survived: dict[str, int] = {}
    for number in range(options.kills):
        kind, least, most = KILLS[number % len(KILLS)]
        if kind in PER_STEP:
            most = max(least, most // options.processes)
        rank = 0 if kind in ON_RANK_0 else rng.randrange(options.processes)
        fault = f"{kind}:{rng.randint(least, most)}:{rank}"
        process = launch("tests.faulty_train", data_dir, killed, options, fault=fault)
        process.communicate(timeout=600)
        if process.returncode == 0:
            break  # it came to its end before the fault's moment
        survived[kind] = survived.get(kind, 0) + 1
        print(f"kill {number + 1}: {fault}, {lines_of(killed)} lines of metrics", flush=True)
    finish(launch("pipeline.train", data_dir, killed, options))
    comparison = compare(straight, killed, "loss")
    print(describe(comparison, "loss"), flush=True)
    return {
        "kills survived": sum(survived.values()),
        "kills by place": survived,
        "bit-equal to the run left alone": comparison.equal,
        "eval rows equal": eval_rows(straight) == eval_rows(killed),
    }


def signal_run(process: subprocess.Popen[str], name: str, options: Options) -> None:
    """Send a signal to the run: to its launcher, which hands it on, but SIGUSR1, by which torchrun
    would be ended, to the ranks."""
    receivers = [process.pid]
    if options.processes > 1 and name == "SIGUSR1":
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        receivers = [int(child) for child in children.split()]
    for receiver in receivers:
        os.kill(receiver, getattr(signal, name))


def survive_signals(data_dir: Path, folder: Path, options: Options) -> dict[str, Any]:
    """Stop a run with each signal once it trains; each must save and be continued."""
    run_dir, codes, saved = folder / "signalled", [], []
    for name in SIGNALS:
        process, before = launch("pipeline.train", data_dir, run_dir, options), lines_of(run_dir)
        while process.poll() is None and lines_of(run_dir) < before + 2:
            time.sleep(0.02)
        signal_run(process, name, options)
        process.communicate(timeout=600)
        codes.append(process.returncode)
        newest = newest_checkpoint(run_dir)
        marked = (run_dir / "interrupted").exists()
        saved.append(marked and newest == f"step-{lines_of(run_dir):08d}")
    finish(launch("pipeline.train", data_dir, run_dir, options))
    comparison = compare(folder / "straight", run_dir, "loss")
    return {
        "signals": list(SIGNALS),
        "saved at the last step": saved,
        "codes of the launcher" if options.processes > 1 else "codes": codes,
        "bit-equal after signals": comparison.equal,
    }


def eval_rows(run_dir: Path) -> list[tuple[Any, ...]]:
    """What an eval found, without what the clock says."""
    rows = read_whole(run_dir / DECODE_SPEED)
    return [
        tuple(row[k] for k in ("step", "method", "temperature", "forwards", "ar_loss"))
        for row in rows
    ]


def refuse_damage(checkpoint: Path, folder: Path) -> dict[str, Any]:
    """Damage each file of a checkpoint in each way; every time the check must refuse it."""
    tried = refused = 0
    for path in sorted(checkpoint.iterdir()):
        for how in DAMAGE:
            copy = folder / f"damaged-{tried}"
            shutil.copytree(checkpoint, copy)
            damage(copy / path.name, how)
            tried += 1
            try:
                verify_file_list(copy)
            except UserError:
                refused += 1
            shutil.rmtree(copy)
    return {"damaged files tried": tried, "damaged files refused": refused}


def damage(path: Path, how: str) -> None:
    """Flip one bit in the middle of `path`, cut it in half, empty it, or delete it."""
    content = bytearray(path.read_bytes())
    if how == "deleted":
        path.unlink()
        return
    if how == "flipped":
        content[len(content) // 2] ^= 1
    length = {"flipped": len(content), "truncated": len(content) // 2, "emptied": 0}[how]
    path.write_bytes(content[:length])


class Attack:
    """Pickles to something that leaves a trace when it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def refuse_bad_inputs(folder: Path) -> dict[str, Any]:
    """Checkpoint files made to do harm; none may be loaded, and none may act."""
    trace, bad = folder / "trace", folder / "bad"
    bad.mkdir()
    torch.save({"module": Attack(trace)}, bad / "attack.pt")
    torch.save(Attack(trace), bad / "old.pt", _use_new_zipfile_serialization=False)
    (bad / "bare.pt").write_bytes(pickle.dumps(Attack(trace)))
    (bad / "text.pt").write_text("no tensors")
    (bad / "empty.pt").touch()
    inputs: list[tuple[Callable[[Path], Any], Path]]
    inputs = [(load_checked, path) for path in sorted(bad.iterdir())]
    entry = {"bytes": 1, "sha256": "0" * 64}
    for number, names in enumerate((["../outside"], ["/etc/hostname"], [])):
        listed = folder / f"listed-{number}"
        listed.mkdir()
        files = dict.fromkeys(names, entry)
        (listed / FILE_LIST).write_text(json.dumps({"files": files}))
        inputs.append((verify_file_list, listed))
    refused = 0
    for check, path in inputs:
        try:
            check(path)
        except UserError:
            refused += 1
    acted = trace.exists()
    return {"bad inputs tried": len(inputs), "bad inputs refused": refused, "acted": acted}


def time_resume(data_dir: Path, run_dir: Path, options: Options) -> dict[str, Any]:
    """Seconds from the start of the command to the first step after a checkpoint."""
    copy = run_dir.with_name("resumed")
    shutil.copytree(run_dir, copy)
    shutil.rmtree(copy / "checkpoints" / str(newest_checkpoint(copy)))
    started = time.perf_counter()
    process = launch("pipeline.train", data_dir, copy, options)
    whole = lines_of(copy)
    while process.poll() is None and lines_of(copy) >= whole:  # until it is cut
        time.sleep(0.01)
    cut = lines_of(copy)
    while process.poll() is None and lines_of(copy) <= cut:
        time.sleep(0.01)
    seconds = time.perf_counter() - started
    finish(process)
    events = read_whole(copy / EVENTS)
    load_s = [event["load_s"] for event in events if event["event"] == "started"][-1]
    return {"resume: seconds to the first step": seconds, "resume: of them loading": load_s}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.reliability", description=__doc__)
    add_options(parser, "the runs", Options)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the JSON file")
    given = parser.parse_args(arguments)
    options, figures = given_options(given, Options), {}
    from bench.saving import time_saving

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data_dir = prepare_small(folder / "data")
        figures.update(survive_kills(data_dir, folder, options))
        figures.update(survive_signals(data_dir, folder, options))
        newest = folder / "straight" / "checkpoints" / "step-00000090"
        figures.update(refuse_damage(newest, folder))
        figures.update(refuse_bad_inputs(folder))
        figures.update(time_resume(data_dir, folder / "straight", options))
        figures.update(time_saving(folder, options.parameters_m))
    content = {"options": asdict(options), **asdict(Outcome(figures=figures))}
    cpu = torch.device("cpu")
    path = write("reliability", cpu, given.results, "bench.reliability", **content)
    for key, value in figures.items():
        print(f"{key}: {value}")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
