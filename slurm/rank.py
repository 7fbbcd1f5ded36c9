"""One rank of train.sbatch: `pipeline.train`, its exit code left where the job script finds it.

torchrun takes every code but 0 for a crash: it gives the other ranks 30 s, kills them, and leaves
with 1 itself. A run that was asked to stop and saved has not crashed, so here torchrun sees 0 and
waits for all ranks; the job script reads what happened from `$TIDAR_START_DIR/exit-code`.
"""

import contextlib
import os
import sys
from pathlib import Path


def main() -> int:
    """Train with the overrides in sys.argv; returns the code for torchrun."""
    # Before the slow imports: from here on node.sh can ask this process to stop.
    own_pid = Path(os.environ["TIDAR_PIDS"]) / str(os.getpid())
    own_pid.touch()
    try:
        return train_and_tell()
    finally:
        own_pid.unlink(missing_ok=True)


def train_and_tell() -> int:
    from data_prep.cli import run
    from pipeline.train import train
    from pipeline.training.signals import EXIT_SAVED

    code = run("train", train)
    if code:
        # The first rank to end tells; the rest are often ended by torchrun because of it.
        with (
            contextlib.suppress(FileExistsError),
            open(Path(os.environ["TIDAR_START_DIR"]) / "exit-code", "x") as file,
        ):
            file.write(str(code))
    return 0 if code == EXIT_SAVED else code


if __name__ == "__main__":
    sys.exit(main())
