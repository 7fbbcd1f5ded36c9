"""Work shared by two copies of this process, as by two ranks or workers of a machine."""

import multiprocessing
from collections.abc import Callable


def by_two(work: Callable[[int], object]) -> None:
    """`work(0)` and `work(1)` at the same time, each in a process of its own.

    Raises:
        RuntimeError: when one of them fails; it has printed why.
    """
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(number,)) for number in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    codes = [process.exitcode for process in processes]
    if any(codes):
        raise RuntimeError(f"processes of a benchmark ended with {codes}")
