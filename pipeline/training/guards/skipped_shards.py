"""Shards that a run went on without (`data.skip_damaged`): a line each in `skipped_shards.jsonl`.

Any rank may meet them, at any time ahead of the step that needs them, and again after every start;
rank 0 writes each once.
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.data.source import DamagedShard
from pipeline.distributed import World
from pipeline.training.moments import Event, Guard, make_event
from pipeline.training.step import GlobalCounts
from tidar_common.jsonlines import append, read_whole
from tidar_common.run_files import SKIPPED_SHARDS


class SkippedShards(Guard):
    """The record of a run directory; all ranks have one and call `record` together.

    Args:
        run_dir: where the file is.
        met: the shards that this rank has left out so far, in the order in which it met them.
        world: the ranks that read.
    """

    def __init__(self, run_dir: Path, met: Callable[[], list[DamagedShard]], world: World) -> None:
        self.path = run_dir / SKIPPED_SHARDS
        self._met = met
        self._world = world
        self._handed_in = 0
        lines = read_whole(self.path) if world.is_main else []
        self._known = {(line.get("set"), line.get("shard")) for line in lines}

    def new(self) -> int:
        """How many shards this rank has met that it has not handed in with `record`."""
        return len(self._met()) - self._handed_in

    def on_counts(self, counts: GlobalCounts, step: int) -> None:
        if counts.damaged_shards:
            for event in self.record():
                self.report(event)

    def record(self) -> list[Event]:
        """Hand in what all ranks have met; on rank 0 the events of what is new, which is written
        by then. A shard that several met stands there with the first of these ranks."""
        met = self._met()
        self._handed_in = len(met)
        rows: list[dict[str, Any]] = []
        for rank, shards in enumerate(self._world.gather(met)):
            for shard in shards if self._world.is_main else ():
                if (shard.set, shard.shard) not in self._known:
                    self._known.add((shard.set, shard.shard))
                    rows.append({**asdict(shard), "rank": rank})
        if rows:
            append(self.path, rows)
        return [event_of(row) for row in rows]


def event_of(row: dict[str, Any]) -> Event:
    """The line of the file as an event of the step that it names."""
    details = dict(row)
    name, step, reason = details["shard"], details.pop("step"), details["reason"]
    of_set = f" of {details['set']}" if details["set"] else ""
    text = f"{name}{of_set} is left out from step {step} on, its sequences are padding: {reason}"
    return make_event("shard_skipped", step, text, **details)
