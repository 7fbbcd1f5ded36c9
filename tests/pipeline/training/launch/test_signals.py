"""What a process says and does when it is asked to stop."""

import signal
import subprocess
import sys
import time

import pytest
from commands import ROOT

PROCESS = """
import time
from pipeline.training.launch.signals import stop_on_signal
with stop_on_signal() as stop:
    stop.newest = lambda: "step-00000007"
    print("ready", flush=True)
    for _ in range(600):
        time.sleep(0.05)
print(stop.name)
"""


@pytest.fixture
def process():
    started = subprocess.Popen(
        [sys.executable, "-c", PROCESS], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    assert started.stdout is not None
    assert started.stdout.readline() == "ready\n"
    yield started
    started.kill()
    started.communicate()


def said(process) -> str:
    line = process.stderr.readline()
    assert line.endswith("\n")
    return line.rstrip()


def test_a_request_is_acknowledged_at_once_and_a_second_ctrl_c_leaves(process):
    process.send_signal(signal.SIGINT)
    assert said(process) == (
        "SIGINT: finishing what is at hand, then saving; Ctrl-C again leaves at once"
    )
    process.send_signal(signal.SIGINT)  # as a launcher passes it on
    time.sleep(2.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130
    assert said(process) == (
        "SIGINT again: left at once; what came after step-00000007 is lost, and the same command "
        "continues from there"
    )


def test_a_scheduler_may_ask_as_often_as_it_likes(process):
    process.send_signal(signal.SIGTERM)
    assert said(process) == "SIGTERM: finishing what is at hand, then saving"
    time.sleep(2.2)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.2)
    assert process.poll() is None
