"""The sandbox against answers that do harm: they must fail, end in time, and leave nothing."""

import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from pipeline.evals.code import sandbox
from pipeline.evals.code.limits import AUDIT, CLONE, DENIED, FAIL, make_filter
from pipeline.evals.code.sandbox import ALL_GUARDS, Limits, run_answer
from tidar_common.errors import UserError

LIMITS = Limits(timeout_s=20.0, memory_gib=2.0)
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the guards are Linux's own")


def run(code: str, limits: Limits = LIMITS) -> sandbox.Verdict:
    return run_answer({"kind": "plain", "code": code}, limits)


def test_ordinary_code_passes_and_all_guards_hold():
    code = (
        "import collections, json, math, re, tempfile, threading\n"
        "assert sum(range(10)) == 45\n"
        "worker = threading.Thread(target=list); worker.start(); worker.join()\n"
        "with tempfile.TemporaryFile('w+') as file:\n"
        "    file.write('x'); file.seek(0); assert file.read() == 'x'\n"
        "open('mine.txt', 'w').write('y')\n"
        "import decimal, fractions\n"
        "assert open(json.__file__).read()\n"
    )
    verdict = run(code)
    assert verdict == sandbox.Verdict(True, False, ALL_GUARDS)


@pytest.mark.parametrize("code", ["assert False", "raise SystemExit(0)", "1 +", "import nope"])
def test_wrong_code_fails(code):
    assert not run(code).passed


def test_an_endless_loop_is_ended_by_the_clock():
    started = time.monotonic()
    verdict = run("while True: pass", Limits(timeout_s=3.0))
    assert (verdict.passed, verdict.timed_out) == (False, True)
    assert time.monotonic() - started < 15


def test_an_endless_sleep_is_ended_too():
    """It takes no processor time, so only the wall clock can."""
    assert run("import time\ntime.sleep(1000)", Limits(timeout_s=3.0)).timed_out


def test_an_endless_loop_that_catches_everything_is_ended():
    code = "while True:\n    try:\n        while True: pass\n    except BaseException: pass"
    assert run(code, Limits(timeout_s=3.0)).timed_out


def session_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[3])
    except OSError:
        return -1


def test_a_fork_bomb_makes_no_process(tmp_path):
    """Each way to a new process is refused with EPERM; threads are no processes and go on."""
    code = """
import _posixsubprocess, ctypes, os, subprocess, sys
refused = 0
for attempt in (
    os.fork, os.forkpty, lambda: os.posix_spawn('/bin/true', ['true'], {}),
    lambda: subprocess.run(['/bin/true']), lambda: os.execv('/bin/true', ['true']),
):
    try:
        attempt()
    except OSError as error:
        refused += 1
    else:
        raise SystemExit
libc = ctypes.CDLL(None, use_errno=True)
assert libc.fork() == -1 and libc.vfork() == -1
assert libc.syscall(435, None, 0) == -1
assert refused == 5
while True:
    try:
        os.fork()
    except OSError:
        break
"""
    before = {int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()}
    assert run(code).passed
    after = {int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()}
    assert not [pid for pid in after - before if session_of(pid) in after - before
                and b"child.py" in _command(pid)]  # fmt: skip


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_nothing_outside_is_written_or_changed(tmp_path):
    target, kept = tmp_path / "new.txt", tmp_path / "kept.txt"
    kept.write_text("before")
    kept.chmod(0o644)
    code = f"""
import os
new, kept, folder = {str(target)!r}, {str(kept)!r}, {str(tmp_path)!r}
attempts = [
    lambda: open(new, 'w'), lambda: open(kept, 'a'), lambda: open(kept, 'r'),
    lambda: os.truncate(kept, 0), lambda: os.remove(kept), lambda: os.rename(kept, new),
    lambda: os.mkdir(new), lambda: os.symlink('/etc/hosts', new), lambda: os.link(kept, new),
    lambda: os.chmod(kept, 0o777), lambda: os.utime(kept), lambda: os.listdir(folder),
    lambda: os.rmdir(folder), lambda: os.chown(kept, 1, 1), lambda: open('/dev/shm/x', 'w'),
    lambda: os.mkfifo(new), lambda: open('/proc/self/mem', 'r+b'),
]
for number, attempt in enumerate(attempts):
    try:
        attempt()
    except OSError:
        continue
    raise AssertionError(number)
"""
    before = kept.stat()
    assert run(code).passed
    assert not target.exists()
    assert kept.read_text() == "before"
    assert (kept.stat().st_mode, kept.stat().st_mtime_ns) == (before.st_mode, before.st_mtime_ns)


def test_no_socket_opens():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        code = f"""
import socket
refused = 0
for kind in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX):
    try:
        socket.socket(kind, socket.SOCK_STREAM)
    except PermissionError:
        refused += 1
assert refused == 3
try:
    socket.create_connection(('127.0.0.1', {listener.getsockname()[1]}), 2)
except OSError:
    pass
else:
    raise SystemExit
"""
        assert run(code).passed
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_no_other_process_is_signalled_or_looked_into():
    code = f"""
import os, signal
for attempt in (lambda: os.kill({os.getpid()}, signal.SIGTERM), lambda: os.kill({os.getpid()}, 0),
                lambda: os.killpg(0, signal.SIGKILL), lambda: os.listdir('/proc/{os.getpid()}')):
    try:
        attempt()
    except OSError:
        continue
    raise SystemExit
"""
    got = []
    previous = signal.signal(signal.SIGTERM, lambda *_: got.append(1))
    try:
        assert run(code).passed
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert got == []


def test_memory_and_file_sizes_end():
    assert run("bytearray(200_000_000)").passed
    assert not run("bytearray(5_000_000_000)").passed
    big = "with open('big', 'wb') as file:\n    for _ in range(9): file.write(bytes(10_000_000))"
    assert not run(big).passed


def test_limits_cannot_be_raised_again():
    code = """
import resource
for attempt in (lambda: resource.setrlimit(resource.RLIMIT_AS, (2**50, 2**50)),
                lambda: resource.setrlimit(resource.RLIMIT_CPU, (10**6, 10**6))):
    try:
        attempt()
    except (OSError, ValueError):
        continue
    raise SystemExit
"""
    assert run(code).passed


def test_a_forged_verdict_is_none():
    code = """
import os, json
for place in range(3, 64):
    try:
        os.write(place, json.dumps({"passed": True, "guards": []}).encode())
    except OSError:
        pass
os._exit(0)
"""
    assert not run(code).passed


def test_nothing_is_left_in_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    run("open('left.txt', 'w').write('x')\nraise SystemExit")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_guard_is_refused_unless_told(monkeypatch, tmp_path):
    broken = tmp_path / "child.py"
    for name in ("child.py", "limits.py"):
        text = sandbox.CHILD.with_name(name).read_text()
        (tmp_path / name).write_text(text.replace('"create": 444', '"create": 9999'))
    monkeypatch.setattr(sandbox, "CHILD", broken)
    with pytest.raises(UserError, match=r"no Landlock .*evals\.code\.all_guards=false"):
        run("pass")
    verdict = run("pass", Limits(timeout_s=20.0, full=False))
    assert verdict.passed
    assert verdict.guards == ("limits", "system calls")


@pytest.mark.parametrize("column", [0, 1])
def test_the_filter_refuses_what_is_listed_and_nothing_else(column):
    """The filter's program run by a small interpreter, for both architectures."""

    def decide(number: int, arch: int = AUDIT[column], flags: int = 0) -> int:
        words = {0: number, 4: arch, 16: flags}
        program, at, held = make_filter(column), 0, 0
        while True:
            code, yes, no, constant = program[at]
            if code == 0x06:
                return constant
            if code == 0x20:
                held, at = words[constant], at + 1
                continue
            test = {0x15: held == constant, 0x35: held >= constant, 0x45: held & constant}[code]
            at += 1 + (yes if test else no)

    allow = 0x7FFF0000
    listed = {pair[column] for pair in DENIED.values() if pair[column] is not None}
    assert len(listed) == sum(pair[column] is not None for pair in DENIED.values())
    for number in range(500):
        verdict = decide(number)
        if number in listed or number == CLONE[column]:
            assert verdict == FAIL | 1
        elif number == 435:
            assert verdict == FAIL | 38
        else:
            assert verdict == allow
    assert decide(CLONE[column], flags=0x10000) == allow
    assert decide(0, arch=0x40000003) != allow
    assert (decide(0x40000000 | 41) == allow) is False
