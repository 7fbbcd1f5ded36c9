"""One rank of train.sbatch: `pipeline.train`, and its exit code left where the job script finds it.

torchrun leaves with 1 whatever code a rank ended with, and with 0 both for a run that is done and
for one that was stopped and saved. `$TIDAR_START_DIR/exit-code` keeps them apart: the code of the
first rank that failed, or 75 from rank 0 for saved.
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
    from omegaconf import DictConfig

    from data_prep.cli import run
    from pipeline.train import INTERRUPTED, train
    from pipeline.training.signals import EXIT_SAVED

    def task(cfg: DictConfig) -> int:
        code = train(cfg)
        # Only rank 0 writes that file, and only it has written it by now.
        if os.environ["RANK"] == "0" and (Path(cfg.run_dir).expanduser() / INTERRUPTED).exists():
            return EXIT_SAVED
        return code

    code = run("train", task)
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
