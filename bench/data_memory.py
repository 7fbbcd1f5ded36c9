"""The memory of `tidar-prepare` and all its workers over a file of gigabytes."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from bench.results import ROOT

POLL_S = 0.2


def peak_of_preparation(
    folder: Path, text: Path, tokenizer: Path, size: int
) -> dict[str, float | int]:
    """Prepare a jsonl file of `size` bytes, made of `text` again and again, with two workers.

    Returns:
        dict: the file's size, seconds, and the largest sum of resident memory seen, in bytes;
            pages that processes share count in each.
    """
    large = folder / "large.jsonl"
    with large.open("wb") as file:
        while file.tell() < size:
            with text.open("rb") as source:
                shutil.copyfileobj(source, file)
    command = [
        sys.executable, "-m", "data_prep.prepare", "corpus=jsonl", f"corpus.path={large}",
        f"tokenizer.path={tokenizer}", f"output_dir={folder / 'large'}", "sequence_length=4096",
        "workers=2",
    ]  # fmt: skip
    started, peak = time.perf_counter(), 0
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, start_new_session=True
    )
    while process.poll() is None:
        peak = max(peak, resident_bytes(process.pid))
        time.sleep(POLL_S)
    if process.returncode:
        raise RuntimeError(f"tidar-prepare ended with {process.returncode}")
    seconds = time.perf_counter() - started
    return {"file bytes": large.stat().st_size, "seconds": seconds, "peak bytes": peak}


def resident_bytes(group: int) -> int:
    """Resident memory of all processes of a process group, as `/proc` has it."""
    total = 0
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if os.getpgid(int(entry.name)) == group:
                total += int((entry / "statm").read_text().split()[1])
        except (OSError, IndexError):
            continue  # it ended meanwhile
    return total * os.sysconf("SC_PAGE_SIZE")
