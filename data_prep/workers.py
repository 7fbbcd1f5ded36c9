"""A process that tokenises: texts in through a pipe of its own, ids out through the same.

Not `concurrent.futures`: its workers share one pipe for results, and one that is killed in the
middle of a result leaves the pool waiting for the rest of it for ever. Here such a pipe just ends.
"""

import os
import queue
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.tokenizers import load_tokenizer


class Worker:
    """Answers come in the order of the texts sent. Ends at once when the other end is closed,
    which the system does if this process is killed: none is ever left behind."""

    def __init__(self, tokenizer_path: Path) -> None:
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, tokenizer_path), daemon=True)
        with _ctrl_c_not_inherited():
            self._process.start()
        theirs.close()

    def send(self, texts: list[str]) -> None:
        """Queue `texts` for encoding; does not wait. Raises UserError when the worker is dead."""
        try:
            self._pipe.send(texts)
        except OSError as error:
            raise self._died() from error

    def receive(self) -> Iterator[NDArray[np.int32]]:
        """The ids of the oldest texts without an answer, an array for each text.

        Raises:
            UserError: when the worker process died.
        """
        try:
            answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error
        if isinstance(answer, str):
            raise RuntimeError(f"in a tokenising process: {answer}")
        ids, ends = answer
        return iter(np.split(ids, ends[:-1]))

    def stop(self) -> None:
        """End the process, in the middle of its work if need be."""
        self._pipe.close()
        self._process.terminate()
        self._process.join()

    def _died(self) -> UserError:
        self._process.join()
        return UserError(
            f"workers: a tokenising process died (exit code {self._process.exitcode}; -9 is often "
            "a lack of memory); run the same command again to continue, perhaps with fewer workers"
        )


@contextmanager
def _ctrl_c_not_inherited() -> Iterator[None]:
    """Processes started inside ignore Ctrl-C from their first instruction on: a terminal sends it
    to all, but one says what happened, and the others are told by their pipe."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _serve(pipe: Connection, tokenizer_path: Path) -> None:
    """The worker's main function. Texts are read by a thread: were they left in the pipe, both
    sides could come to wait until the other one reads."""
    texts: queue.Queue[list[str]] = queue.Queue()
    threading.Thread(target=_read, args=(pipe, texts), daemon=True).start()
    try:
        tokenizer = load_tokenizer(tokenizer_path)
        while True:
            pipe.send(_flat(tokenizer.encode_batch(texts.get())))
    except OSError:
        return  # nobody reads any more
    except Exception:
        pipe.send(traceback.format_exc())


def _read(pipe: Connection, texts: "queue.Queue[list[str]]") -> None:
    try:
        while True:
            texts.put(pipe.recv())
    except (EOFError, OSError):
        os._exit(0)


def _flat(ids: Sequence[NDArray[np.int32]]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """All ids one behind the other, and where each text's end: two arrays travel faster than
    hundreds."""
    return np.concatenate(ids), np.cumsum([len(own) for own in ids])
