"""What a training step frees is there for the next one, without asking the system again."""

import subprocess
import sys

from tests.commands import ROOT

STEPS = """
import resource, sys, torch
from pipeline.host_memory import keep_freed_memory
if "keep" in sys.argv:
    assert keep_freed_memory()
torch.set_num_threads(1)
model = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.SiLU())] * 2)
x = torch.randn(2**17 + 2**14, 64)  # 38 MB: what is over 32 glibc always gives back
for _ in range(10):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    model(x).square().mean().backward()
    model.zero_grad()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(*words: str) -> int:
    """Of five steps, after five in which the process grows to what it needs."""
    done = subprocess.run(
        [sys.executable, "-c", STEPS, *words], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return sum(int(line) for line in done.stdout.split()[5:])


def test_steps_use_the_memory_of_earlier_ones():
    plain, kept = page_faults(), page_faults("keep")
    assert kept < plain / 5
