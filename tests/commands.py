"""The project's commands as a user runs them, at sizes that take seconds.

Most of a short command's time is Python importing torch and DeepSpeed. `run` forks its processes
from one that has imported them already; `command` gives the words for a start from nothing, under
torchrun itself, for tests that are about starts, signals and ends.
"""

import atexit
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from multiprocessing.context import ForkServerProcess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 400
PRELOADED = [
    "torch", "deepspeed", "hydra", "wandb", "pytest", "data_prep.prepare", "pipeline.report.page",
    "pipeline.training.setup", "pipeline.evals.run", "tensorboard.summary.writer.event_file_writer",
]  # fmt: skip
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(PRELOADED)
SMALL_MODEL = (
    "model=tiny", "model.hidden_size=32", "model.intermediate_size=48",
    "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=1", "model.head_dim=16",
    "model.max_positions=256",
)  # fmt: skip
SMALL_RUN = (
    *SMALL_MODEL, "precision=fp32", "steps=12", "global_batch_size=8", "micro_batch_size=2",
    "optimizer.learning_rate=0.01", "schedule.warmup_steps=2", "checkpoint.every=4",
    "evals.decode_speed.every=6", "evals.decode_speed.prompts=3",
    "evals.decode_speed.prompt_tokens=8", "evals.decode_speed.max_new_tokens=12",
    "evals.decode_speed.score_sequences=4", "log_every_s=0",
)  # fmt: skip


def command(module: str, *overrides: str, processes: int | None = None) -> list[str]:
    """The command line of an entry point; under torchrun when `processes` is given."""
    if processes is None:
        return [sys.executable, "-m", module, *overrides]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *launcher, "-m", module, *overrides]


def run(
    module: str, *overrides: str, processes: int | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run it to its end from the repository's folder; several processes as torchrun would: when one
    fails, the others are asked to end, and the code is 1."""
    ranks: list[dict[str, str]] = [{}] if processes is None else as_torchrun(processes)
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        started = [
            FORKSERVER.Process(
                target=become, args=(module, overrides, {**os.environ, **environment, **rank},
                                     out, err)
            )
            for rank in ranks
        ]  # fmt: skip
        for process in started:
            process.start()
        codes = wait_for(started)
        words = command(module, *overrides, processes=processes)
        code = codes[0] if processes is None else int(any(codes))
        texts = [path.read_text() if path.exists() else "" for path in (out, err)]
    return subprocess.CompletedProcess(words, code, *texts)


def as_torchrun(processes: int) -> list[dict[str, str]]:
    """What torchrun tells each rank of a machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
         "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
         "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0"}
        for rank in range(processes)
    ]  # fmt: skip


def wait_for(started: list[ForkServerProcess]) -> list[int]:
    """Exit codes; the rest are ended when one fails, and all when it takes too long."""
    deadline = time.monotonic() + TIMEOUT_S
    while any(process.is_alive() for process in started):
        if time.monotonic() > deadline:
            for process in started:
                process.kill()
            raise subprocess.TimeoutExpired([p.name for p in started], TIMEOUT_S)
        if any(process.exitcode for process in started):
            for process in started:
                process.terminate()
        for process in started:
            process.join(0.02)
    return [process.exitcode or 0 for process in started]


def become(
    module: str, overrides: tuple[str, ...], environment: dict[str, str], out: Path, err: Path
) -> None:
    """Be `python -m module *overrides` in this new process; does not return."""
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = [module, *overrides]
    sys.path.insert(0, str(ROOT))
    code = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # as at the end of any program
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def prepare_small(folder: Path, *overrides: str) -> Path:
    """Prepare a part of Python's library into `folder`."""
    done = run(
        "data_prep.prepare", f"output_dir={folder}", "corpus.max_bytes=400000",
        "sequence_length=64", "tokenizer.vocab_size=400", "layout.block_size=4",
        "heldout_fraction=0.2", "shard_sequences=512", "group_size=8", *overrides,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def train_small(
    data_dir: Path, run_dir: Path, *overrides: str, processes: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Train a model of some ten thousand parameters for 12 steps; later overrides win."""
    return run("pipeline.train", f"data.dir={data_dir}", f"run_dir={run_dir}", *SMALL_RUN,
               *overrides, processes=processes)  # fmt: skip
