"""Reads the `.wandb` file of an offline run, so that tests see what would be uploaded.

The file is a LevelDB log: after a header of 7 bytes, blocks of 32 KiB with records of a 7-byte
header (checksum, length, type) and a piece of a protobuf `Record`.
"""

import json
import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

HEADER, BLOCK = 7, 32768
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path: Path) -> Iterator[Any]:
    """The protobuf records of one run file, in order; of one that is being written those that are
    whole."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, parts = HEADER, b""
    while position < len(data):
        if BLOCK - position % BLOCK < HEADER:  # too short for a header: padding
            position += BLOCK - position % BLOCK
            continue
        if len(data) - position < HEADER:
            return  # it is being written
        _, length, kind = struct.unpack("<IHB", data[position : position + HEADER])
        if kind not in (FULL, FIRST, MIDDLE, LAST):
            raise ValueError(f"{path}: record of type {kind} at byte {position}")
        start = position + HEADER
        position = start + length
        if position > len(data):
            return
        parts = data[start:position] if kind in (FULL, FIRST) else parts + data[start:position]
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Everything logged, row by row."""
    return [
        {
            "/".join(item.nested_key) or item.key: json.loads(item.value_json)
            for item in record.history.item
        }
        for record in records(path)
        if record.WhichOneof("record_type") == "history"
    ]


def history(path: Path) -> dict[int, dict[str, Any]]:
    """Everything logged, by optimizer step."""
    steps: defaultdict[int, dict[str, Any]] = defaultdict(dict)
    for row in rows_of(path):
        steps[int(row["step"])].update(row)
    return dict(steps)


def run_record(path: Path) -> Any:
    """The run's own record: id, project, name, config."""
    return next(r.run for r in records(path) if r.WhichOneof("record_type") == "run")
