"""Worker processes give what one process gives, and their end is noticed."""

import multiprocessing
import os
import signal
import time

import pytest

from data_prep import encoding
from data_prep.corpora import Document
from data_prep.encoding import encode_documents
from data_prep.errors import UserError
from data_prep.workers import Worker


@pytest.fixture
def documents(texts, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 20_000)
    return [Document(f"{n}-{i}", text) for n in range(2) for i, text in enumerate(texts)]


def as_lists(encoded):
    return [(one.id, one.ids.tolist(), one.text_bytes) for one in encoded]


def gone(pid):
    """Whether a process has ended; a zombie has."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_three_workers_give_what_one_gives(documents, tokenizer, tokenizer_path):
    alone = as_lists(encode_documents(documents, tokenizer, tokenizer_path, 1))
    assert [entry[0] for entry in alone] == [document.id for document in documents]
    assert alone[5][1] == tokenizer.encode(documents[5].text)
    assert alone[-1][2] == len(documents[-1].text.encode())
    assert as_lists(encode_documents(documents, tokenizer, tokenizer_path, 3)) == alone


def test_a_dead_worker_is_one_clear_error(documents, tokenizer, tokenizer_path, monkeypatch):
    made = []

    class Watched(Worker):
        def __init__(self, path):
            super().__init__(path)
            made.append(self._process)

    monkeypatch.setattr(encoding, "Worker", Watched)
    encoded = encode_documents(documents * 20, tokenizer, tokenizer_path, 2)
    next(encoded)
    os.kill(made[1].pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"^workers: a tokenising process died \(exit code -9"):
        list(encoded)
    assert all(not process.is_alive() for process in made), "the others must not stay behind"


def test_closing_ends_the_workers_in_the_middle(documents, tokenizer, tokenizer_path):
    encoded = encode_documents(documents * 50, tokenizer, tokenizer_path, 2)
    next(encoded)
    started = time.monotonic()
    encoded.close()
    assert time.monotonic() - started < 5
    assert multiprocessing.active_children() == []


def test_a_worker_ends_with_the_pipe(tokenizer_path):
    """As the system closes it when the main process is killed."""
    worker = Worker(tokenizer_path)
    worker.send(["some text"])
    assert len(list(worker.receive())) == 1
    worker._pipe.close()
    deadline = time.monotonic() + 10
    while not gone(worker._process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    worker._process.join()


def test_a_fault_inside_a_worker_keeps_its_traceback(tokenizer_path):
    worker = Worker(tokenizer_path)
    worker.send([3])
    with pytest.raises(RuntimeError, match=r"in a tokenising process: Traceback[\s\S]*TypeError"):
        list(worker.receive())
    worker.stop()
