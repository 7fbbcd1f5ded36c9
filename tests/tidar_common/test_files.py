"""Files are complete or not there, whatever ends the writing."""

import hashlib
import signal
import subprocess
import sys
import textwrap

import pytest

from tidar_common.files import sha256_of, write_text_atomic, written_atomically


def test_killed_in_the_middle_of_writing_it_leaves_no_file(tmp_path):
    code = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        from tidar_common.files import written_atomically

        with written_atomically(Path(sys.argv[1])) as file:
            file.write(b"half of it")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    path = tmp_path / "000000.tar"
    done = subprocess.run([sys.executable, "-c", code, str(path)], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = (left.name for left in tmp_path.iterdir())
    assert left.startswith(".000000.tar.")
    assert left.endswith(".writing")
    with written_atomically(path) as file:
        file.write(b"all of it")
    assert path.name in {left.name for left in tmp_path.iterdir()}
    assert path.read_bytes() == b"all of it"


def test_an_exception_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "folder" / "x.txt"
    write_text_atomic(path, "old")

    def interrupted():
        with written_atomically(path) as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [left.name for left in path.parent.iterdir()] == ["x.txt"]
    assert path.read_text() == "old"


def test_a_hash_over_more_than_one_chunk(tmp_path):
    content = bytes(range(256)) * 5000
    (tmp_path / "x").write_bytes(content)
    assert sha256_of(tmp_path / "x") == hashlib.sha256(content).hexdigest()
