"""What a run directory holds and what its processes end with: the contract of those who write it
(training) and those who only read it (status, report, Slurm's scripts). Nothing here needs torch.
"""

from enum import IntEnum

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
STARTS = "starts.jsonl"
"""Written by slurm/restart.py: a line for each start of a job, and one for its end."""
SKIPPED_SHARDS = "skipped_shards.jsonl"
"""Damaged shards that the run went on without, a line each."""
DECODE_SPEED = "evals/decode_speed.jsonl"
EXAMPLE = "evals/example.json"
METHOD_LABELS = {
    "ar": "AR",
    "tidar": "TiDAR",
    "tidar_chosen": "TiDAR, chosen step",
    "recurrent": "draft head alone",
    "block_diffusion": "block diffusion (not lossless)",
    "prompt_lookup": "prompt lookup",
    "speculative": "speculative",
}
"""What readers are shown for the `method` of a row of `DECODE_SPEED`."""


class Exit(IntEnum):
    """Exit codes of every command."""

    DONE = 0
    FAULT = 1
    """Of this project, with a traceback; of `tidar-status --compare`, that the runs differ."""
    BAD_INPUT = 2
    """A mistake in config or input: one line on stderr that names the remedy."""
    STOPPED = 3
    """Training stopped for a numerical reason; it would only recur."""
    LOST = 4
    """A process of the run is gone or stuck."""
    SAVED = 75
    """Asked to stop, and saved: the same command goes on (EX_TEMPFAIL of sysexits.h)."""
    INTERRUPTED = 130
    """By Ctrl-C, as shells say it."""
    CLOSED_PIPE = 141
    """The reader of the output went away, as `head` does."""


FINAL = {
    Exit.DONE: "done",
    Exit.BAD_INPUT: "bad config or input",
    Exit.STOPPED: "stopped for a numerical reason",
}
"""After these a job is over, and why; after any other code it is worth another start."""
