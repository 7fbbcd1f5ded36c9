"""Freed tensors are reused without asking the system for memory again."""

import subprocess
import sys

from tests.commands import ROOT

FAULTS = """
import resource, sys, torch
from pipeline.host_memory import keep_freed_memory
if "keep" in sys.argv:
    assert keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    before = faults()
    x = torch.ones(64, 1024, 1024)   # 256 MB, over the size from which glibc always asks the system
    del x
    print(faults() - before)
"""
PAGES = 256 * 2**20 // 4096


def page_faults(*words: str) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, *words], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return [int(line) for line in done.stdout.split()]


def test_memory_of_a_freed_tensor_is_used_again():
    plain, kept = page_faults(), page_faults("keep")
    # A page may be 4 KiB or, where the system gives huge ones, 2 MiB.
    assert plain[2] >= PAGES / 512
    assert kept[0] >= PAGES / 512
    assert kept[2] < plain[2] / 20
