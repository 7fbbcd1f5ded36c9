"""The project's commands as a user runs them, at sizes that take seconds."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 240
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
    """Run it to its end from the repository's folder."""
    return subprocess.run(
        command(module, *overrides, processes=processes),
        cwd=ROOT, env={**os.environ, **environment}, text=True, capture_output=True,
        timeout=TIMEOUT_S, stdin=subprocess.DEVNULL,
    )  # fmt: skip


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
