"""One rank of train.sbatch: `pipeline.train`, and its exit code left where the job script finds it.

torchrun leaves with 1 whatever code a rank ended with, and with 0 both for a run that is done and
for one that was stopped and saved; srun would end the other ranks for a code that is not 0, also
those that still write the last of a save. `$TIDAR_START_DIR/exit-code` keeps them apart: the code
of the first rank whose code is not 0, 75 for saved.
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
    link_logs(Path(os.environ["TIDAR_RANK_LOGS"]), os.environ["RANK"])
    try:
        return train_and_tell()
    finally:
        own_pid.unlink(missing_ok=True)


def link_logs(folder: Path, rank: str) -> None:
    """Name this rank's log files by its rank: torchrun's own names hold a random part."""
    for descriptor, name in ((1, "out"), (2, "err")):
        file = Path(f"/proc/self/fd/{descriptor}").resolve()
        link = folder / f"rank-{rank}.{name}"
        if file.is_relative_to(folder.resolve()):
            with contextlib.suppress(FileExistsError):
                link.symlink_to(file.relative_to(folder.resolve()))


def train_and_tell() -> int:
    from pipeline.train import train
    from pipeline.training.launch.signals import EXIT_CODE_FILE, leave_code
    from tidar_common.cli import run
    from tidar_common.run_files import Exit

    # Also for the watchdog, which ends the process by itself.
    os.environ[EXIT_CODE_FILE] = str(Path(os.environ["TIDAR_START_DIR"]) / "exit-code")
    code = run("train", train)
    if code:
        leave_code(code)
    return Exit.DONE if code == Exit.SAVED else code


if __name__ == "__main__":
    sys.exit(main())
