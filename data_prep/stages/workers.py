"""Processes that do tasks, each as fast as it can, and what they tell the main one.

Not `concurrent.futures` or loky: when the main process is killed, their workers stay behind, for
they hold the pipes' other ends themselves. Here every pipe has one end in each process, so it just
ends. (loky also starts each worker as a new Python: a second, as long as a small task takes.)
"""

import gc
import os
import queue
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

from data_prep.stages.plan import Preparation, Task
from tidar_common.errors import UserError

START = "fork" if sys.platform == "linux" else "spawn"
"""A copy of this process costs nothing; a new one is a second start of Python, as long as the text
of a small task. Elsewhere system libraries do not bear to be copied."""
Report = Callable[[int, int, int], None]
"""Called with documents, text bytes and tokens done since the last call."""
Job = Callable[[Task, Preparation, Report], None]
"""What is done for a task: a function of a module, so that it can be sent to a process."""
Message = tuple[Any, ...]
"""`("progress", documents, bytes, tokens)`, `("done",)`, or what ended the worker: `("mistake",
text)`, `("system", errno, text)`, `("fault", traceback)`."""
REPORT_EVERY_DOCUMENTS = 500


class BatchedReport:
    """Passes on what is done, many documents at a time: out of a worker each call is a message."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._since = (0, 0, 0)

    def add(self, documents: int, text_bytes: int, tokens: int) -> None:
        before = self._since
        self._since = before[0] + documents, before[1] + text_bytes, before[2] + tokens
        if self._since[0] >= REPORT_EVERY_DOCUMENTS:
            self.flush()

    def flush(self) -> None:
        self._report(*self._since)
        self._since = (0, 0, 0)


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
        self, job: Job, tasks: Sequence[Task], preparation: Preparation, report: Report
    ) -> None:
        """Do `job` for all `tasks`.

        Raises:
            UserError: for what is wrong with the text, or when a worker process dies.
        """
        if min(self.count, len(tasks)) <= 1:
            for task in tasks:
                job(task, preparation, report)
            return
        waiting = deque(tasks)
        busy: dict[Connection, Worker] = {}
        for worker in self.started[: len(tasks)]:
            worker.send((job, preparation))
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

    def send(self, item: tuple[Job, Preparation] | Task) -> None:
        """Give it a job for the tasks to come, or the next task. UserError when it is dead."""
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
    received: queue.SimpleQueue[tuple[Job, Preparation] | Task] = queue.SimpleQueue()

    def listen() -> None:
        try:
            while True:
                received.put(pipe.recv())
        except (EOFError, OSError):
            os._exit(0)

    def report(documents: int, text_bytes: int, tokens: int) -> None:
        pipe.send(("progress", documents, text_bytes, tokens))

    threading.Thread(target=listen, daemon=True).start()
    try:
        while True:
            item = received.get()
            if isinstance(item, tuple):
                work = item
            else:
                job, preparation = work
                job(item, preparation, report)
                pipe.send(("done",))
    except UserError as error:
        pipe.send(("mistake", str(error)))
    except BrokenPipeError:
        return  # nobody reads any more
    except OSError as error:
        pipe.send(("system", error.errno, error.strerror))
    except Exception:
        pipe.send(("fault", traceback.format_exc()))
