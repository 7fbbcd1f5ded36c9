"""What follows a start of train.sbatch, and a record of every start in RUN_DIR/starts.jsonl.

    python slurm/restart.py start RUN_DIR
    python slurm/restart.py end RUN_DIR CODE START_DIR

`end` prints one line for the job script, `requeue DELAY_S NODES` or `stop 0 -`; NODES are to be
excluded from then on, separated by commas, or `-`. What a reader of the log should know goes to
stderr. Only the standard library is imported, here and in `tidar_common`'s files: this runs between
two starts, where every second counts.

A run that was saved (75) is requeued without limit. A crash is retried after a wait that doubles
each time. Crashes count while no newer checkpoint appears between them: a long run may crash once a
day, a loop ends. A mistake in the config (2) and a loss that is not finite (3) would only recur.
"""

import os
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tidar_common.jsonlines import append, read_whole
from tidar_common.run_files import FINAL, STARTS, Exit, newest_checkpoint

LONGEST_BACKOFF_S = 3600
NODE_FAILURES = 2
"""A node that failed this often in a run is left out of its next starts."""


@dataclass(frozen=True)
class Next:
    """What the job script does next."""

    requeue: bool
    delay_s: int = 0
    exclude: tuple[str, ...] = ()
    why: str = ""

    def line(self) -> str:
        verb = "requeue" if self.requeue else "stop"
        return f"{verb} {self.delay_s} {','.join(self.exclude) or '-'}"


def decide(ends: list[dict[str, Any]], max_crashes: int, backoff_s: int) -> Next:
    """What follows the last of the run's recorded `ends`."""
    code = ends[-1]["code"]
    if code == Exit.SAVED:
        return Next(True, exclude=bad_nodes(ends), why="saved")
    if code in FINAL:
        return Next(False, why=FINAL[code])
    crashes = crashes_without_progress(ends)
    if crashes > max_crashes:
        return Next(
            False,
            why=f"crashed {crashes} times without a new checkpoint, and TIDAR_MAX_CRASHES is "
            f"{max_crashes}; see the ranks' logs, then submit again",
        )
    delay = min(backoff_s * 2 ** (crashes - 1), LONGEST_BACKOFF_S)
    return Next(
        True,
        delay,
        bad_nodes(ends),
        f"crash {crashes} without a new checkpoint, retried at most {max_crashes} times",
    )


def crashes_without_progress(ends: list[dict[str, Any]]) -> int:
    """Crashes of this job since its newest checkpoint appeared; a new job has all its retries."""
    last, count = ends[-1], 0
    for end in reversed(ends):
        if (end["job"], end["checkpoint"]) != (last["job"], last["checkpoint"]):
            break
        if end["code"] != Exit.SAVED:
            count += 1
    return count


def bad_nodes(ends: list[dict[str, Any]]) -> tuple[str, ...]:
    """Nodes that were the first to fail in several crashes of this job; a new job asks anew."""
    job = ends[-1]["job"]
    failures = Counter(end["failed_node"] for end in ends if end["job"] == job)
    return tuple(sorted(n for n, count in failures.items() if n and count >= NODE_FAILURES))


def failed_node(start_dir: Path) -> str | None:
    """The node that failed first in a start, None where no node said so.

    A rank that was killed says more than one that raised: the others raise because it is gone.
    Among equals the earliest counts, which between nodes is only as good as their clocks.
    """
    failures = []
    for path in start_dir.glob("failed-*@*"):
        kind, _, when = path.read_text().strip().partition(" ")
        node = path.name.removeprefix("failed-").partition("@")[0]
        failures.append((kind != "killed", float(when or "inf"), node))
    return min(failures)[2] if failures else None


def main(arguments: list[str]) -> None:
    what, run_dir = arguments[0], Path(arguments[1])
    record = run_dir / STARTS
    event: dict[str, Any] = {
        "event": what,
        "job": os.environ["SLURM_JOB_ID"],
        "start": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        "time": round(time.time(), 3),
    }
    if what == "start":
        append(record, [{**event, "nodes": os.environ["SLURM_JOB_NODELIST"]}])
        return
    event |= {
        "code": int(arguments[2]),
        "checkpoint": newest_checkpoint(run_dir),
        "failed_node": None,
    }
    if event["code"] != Exit.SAVED and event["code"] not in FINAL:
        event["failed_node"] = failed_node(Path(arguments[3]))
    ends = [earlier for earlier in read_whole(record) if earlier.get("event") == "end"]
    following = decide(
        [*ends, event],
        int(os.environ.get("TIDAR_MAX_CRASHES", "3")),
        int(os.environ.get("TIDAR_BACKOFF_S", "60")),
    )
    append(record, [{**event, "requeued": following.requeue, "why": following.why}])
    print(following.line())
    if event["code"] not in (Exit.DONE, Exit.SAVED):
        at = f" (first on {event['failed_node']})" if event["failed_node"] else ""
        prefix = "train.sbatch: " if following.requeue else "error: "
        print(f"{prefix}{following.why}{at}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
