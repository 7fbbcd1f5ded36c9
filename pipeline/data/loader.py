"""The batches of this rank's share of every optimizer step, read ahead by a thread."""

import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

from pipeline.data.batch import Batch, make_batch, section_length
from pipeline.data.order import numbers_after
from pipeline.data.source import Source

READ_AHEAD_STEPS = 2


@dataclass(frozen=True)
class Share:
    """How a global batch is divided: rank r of `world_size` takes, in each of
    `accumulation_steps` rounds, the r-th run of `micro_batch_size` sequences."""

    micro_batch_size: int
    accumulation_steps: int
    rank: int
    world_size: int

    @property
    def global_batch_size(self) -> int:
        """Sequences in an optimizer step."""
        return self.micro_batch_size * self.accumulation_steps * self.world_size

    def numbers(
        self, sequences_seen: int, left_out: Sequence[tuple[int, int]] = ()
    ) -> list[list[int]]:
        """Order numbers of the sequences of each round of the step after `sequences_seen`."""
        step = numbers_after(sequences_seen, self.global_batch_size, left_out)
        size = self.micro_batch_size
        starts = (
            (number * self.world_size + self.rank) * size
            for number in range(self.accumulation_steps)
        )
        return [step[start : start + size] for start in starts]


def step_batches(
    source: Source,
    share: Share,
    sequences_seen: int,
    *,
    with_slots: bool,
    alone_share: float = 0.0,
    causal_slots: bool = False,
    left_out: Sequence[tuple[int, int]] = (),
) -> Generator[list[Batch]]:
    """Yield, without end, the micro-batches of one optimizer step after another.

    A thread reads ahead; what goes wrong there is raised here. Close the generator to end it.
    Sequences whose order numbers lie in the ranges `left_out` never come; the order of all others
    stays. `alone_share` of the blocks are drafted without slots as well (`make_batch`);
    `causal_slots` is that of the model.
    """
    length = source.manifest.sequence_length
    slots = section_length(length, source.coverage, source.block_slots) if with_slots else 0
    mask_token_id = source.manifest.tokenizer.mask_id

    def read() -> Iterator[list[Batch]]:
        seen = sequences_seen
        while True:
            yield [
                make_batch(
                    [source[n] for n in numbers],
                    mask_token_id,
                    slots,
                    alone_share=alone_share,
                    causal_slots=causal_slots,
                )
                for numbers in share.numbers(seen, left_out)
            ]
            seen = numbers_after(seen, share.global_batch_size, left_out)[-1] + 1

    return ahead(read(), READ_AHEAD_STEPS)


def ahead(batches: Iterator[list[Batch]], depth: int) -> Generator[list[Batch]]:
    """`batches`, produced by a thread that stays up to `depth` items ahead."""
    ready: queue.Queue[list[Batch] | BaseException] = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: list[Batch] | BaseException) -> None:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.2)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in batches:
                put(item)
                if stopped.is_set():
                    return
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=work, name="tidar-read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()  # a daemon thread that is cut off by the interpreter's end can abort it
