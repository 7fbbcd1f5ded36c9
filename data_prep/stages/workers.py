"""Processes that do tasks, each as fast as it can, and what they tell the main one.

Not `concurrent.futures`: its workers share one pipe for results, and one that is killed in the
middle of a result leaves the pool waiting for the rest of it for ever. Here such a pipe just ends.
"""

import gc
import os
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from data_prep.corpora import Corpus
from data_prep.settings import PrepareSettings
from data_prep.stages.plan import Task
from data_prep.stages.task import Report
from data_prep.tokenizers.load import Tokenizer, load_encoder
from tidar_common.errors import UserError

START = "fork" if sys.platform == "linux" else "spawn"
"""A copy of this process costs nothing; a new one is a second start of Python, as long as the text
of a small task. Elsewhere system libraries do not bear to be copied."""
Job = Callable[[Task, PrepareSettings, Corpus, Tokenizer, Report], None]
"""What is done for a task: a function of a module, so that it can be sent to a process."""
Message = tuple[Any, ...]
"""`("progress", documents, bytes, tokens)`, `("done",)`, or what ended the worker: `("mistake",
text)`, `("system", errno, text)`, `("fault", traceback)`."""


@dataclass(frozen=True)
class Work:
    """What a worker is told once before it gets tasks."""

    job: Job
    settings: PrepareSettings
    corpus: Corpus
    tokenizer_path: Path
    encoder: str


class Workers:
    """The processes of one preparation, for all of its stages; inside `with` they wait for tasks.

    They have to be made before this process starts a thread, opens a connection to a store or locks
    a folder: copies have no threads, and would hold on to the rest.

    Args:
        count: how many tasks are done at a time; one is this process itself.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.started: list[Worker] = []

    def __enter__(self) -> "Workers":
        try:
            while self.count > 1 and len(self.started) < self.count:
                self.started.append(Worker([worker.pipe for worker in self.started]))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.started:
            worker.stop()

    def run(
        self, job: Job, tasks: Sequence[Task], settings: PrepareSettings, corpus: Corpus,
        tokenizer: Tokenizer, tokenizer_path: Path, report: Report,
    ) -> None:  # fmt: skip
        """Do `job` for all `tasks`.

        Raises:
            UserError: for what is wrong with the text, or when a worker process dies.
        """
        if min(self.count, len(tasks)) <= 1:
            for task in tasks:
                job(task, settings, corpus, tokenizer, report)
            return
        waiting = deque(tasks)
        busy: dict[Connection, Worker] = {}
        for worker in self.started[: len(tasks)]:
            worker.send(Work(job, settings, corpus, tokenizer_path, tokenizer.encoder))
            worker.send(waiting.popleft())
            busy[worker.pipe] = worker
        while busy:
            for pipe in wait(list(busy)):
                assert isinstance(pipe, Connection), "only pipes are waited for"
                message = busy[pipe].receive()
                if message[0] == "progress":
                    report(*message[1:])
                elif waiting:
                    busy[pipe].send(waiting.popleft())
                else:
                    del busy[pipe]


class Worker:
    """One process. It ends at once when the other end of its pipe is closed, which the system does
    if this process is killed: none is ever left behind.

    Args:
        others: this process' pipes to earlier workers, of which a copy of it would hold a copy.
    """

    def __init__(self, others: Sequence[Connection] = ()) -> None:
        context: Any = get_context(START)
        self.pipe: Connection
        self.pipe, theirs = context.Pipe()
        copied = [self.pipe, *others] if START == "fork" else []
        self.process = context.Process(target=_serve, args=(theirs, copied), daemon=True)
        with _ctrl_c_not_inherited():
            self.process.start()
        theirs.close()

    def send(self, item: Work | Task) -> None:
        """Give it work, or the next task of its work. Raises UserError when it is dead."""
        try:
            self.pipe.send(item)
        except OSError as error:
            raise self._died() from error

    def receive(self) -> Message:
        """Its next message.

        Raises:
            UserError: when the text is wrong, or the process died.
            OSError: when it could not write.
            RuntimeError: for a fault in the code, with the traceback of the process.
        """
        try:
            message: Message = self.pipe.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error
        kind = message[0]
        if kind == "mistake":
            raise UserError(message[1])
        if kind == "system":
            raise OSError(*message[1:])
        if kind == "fault":
            raise RuntimeError(f"in a worker process: {message[1]}")
        return message

    def stop(self) -> None:
        """End the process, in the middle of its work if need be."""
        self.pipe.close()
        self.process.terminate()
        self.process.join()

    def _died(self) -> UserError:
        self.process.join()
        return UserError(
            f"workers: a process died (exit code {self.process.exitcode}; -9 is often a lack of "
            "memory); run the same command again to continue, perhaps with fewer workers"
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


def _serve(pipe: Connection, copied: Sequence[Connection]) -> None:
    """The worker's main function. A thread waits for tasks, so that the end of the pipe is noticed
    in the middle of one."""
    for other in copied:
        other.close()  # or the ends that others wait for would never come
    gc.freeze()  # what was there before is not looked through again and again
    given: deque[Work | Task] = deque()
    there = threading.Semaphore(0)

    def listen() -> None:
        try:
            while True:
                given.append(pipe.recv())
                there.release()
        except (EOFError, OSError):
            os._exit(0)

    def report(documents: int, text_bytes: int, tokens: int) -> None:
        pipe.send(("progress", documents, text_bytes, tokens))

    threading.Thread(target=listen, daemon=True).start()
    try:
        while True:
            there.acquire()
            item = given.popleft()
            if isinstance(item, Work):
                work, tokenizer = item, load_encoder(item.tokenizer_path, item.encoder)
            else:
                work.job(item, work.settings, work.corpus, tokenizer, report)
                pipe.send(("done",))
    except UserError as error:
        pipe.send(("mistake", str(error)))
    except BrokenPipeError:
        return  # nobody reads any more
    except OSError as error:
        pipe.send(("system", error.errno, error.strerror))
    except Exception:
        pipe.send(("fault", traceback.format_exc()))
