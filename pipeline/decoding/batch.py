"""Requests through a batch: a row that is done makes room for the next request at once."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pipeline.decoding.proposals import Proposer
from pipeline.decoding.sampling import Sampling
from pipeline.decoding.step import StepShape
from pipeline.decoding.stops import Limit


class Engine(Protocol):
    """What decodes a batch of rows: a `StepEngine` or a `BlockDiffusionEngine`."""

    device: torch.device
    batch_size: int
    sampling: Sampling
    shape: StepShape
    proposer: Proposer | None
    verified: list[int]
    """Drafts that each row's last step had to verify."""
    queries: int
    """Query tokens of a row in the last step."""

    def admit(self, row: int, prompt: Tensor, seed: int) -> tuple[list[int], int]:
        """Read a prompt into a row; tokens final at once, and the forwards it took."""

    def propose(self, text: Sequence[int]) -> None:
        """Let a proposer draft what follows `text`; nothing without one."""

    def step(self) -> list[list[int]]:
        """One forward: the tokens that became final in each row."""

    def release(self, row: int) -> None:
        """The row's request is done."""


@dataclass(frozen=True)
class Request:
    """One prompt and how it is continued."""

    prompt: Tensor
    """int64 [N]"""
    seed: int
    limit: Limit


@dataclass(frozen=True)
class Progress:
    """What one forward did for one request."""

    request: int
    """Index among the requests."""
    tokens: list[int]
    """New tokens that count."""
    made: int
    """How many it made before the limits cut them."""
    drafts: int
    """Drafts that it had to verify; 0 for a prompt."""
    queries: int
    """Its query tokens; 0 for a prompt."""
    forwards: int
    """1, or the number of pieces in which the prompt was read."""
    seconds: float
    """Since the request was admitted."""
    prefill: bool
    done: bool


@dataclass
class _Admitted:
    """A request that has a row."""

    number: int
    limit: Limit
    text: list[int]
    """Prompt and new tokens, where a proposer wants them."""
    started: float


def decode_requests(engine: Engine, requests: Iterable[Request]) -> Iterator[Progress]:
    """Decode all requests, at most `engine.batch_size` at a time; progress as it comes.

    Which requests stand beside a request does not change its tokens, but to rounding. A request
    is taken when a row is free for it, so that `requests` may be made on the way.
    """
    waiting = enumerate(requests)
    owner: dict[int, _Admitted] = {}
    while True:
        for row in range(engine.batch_size):
            while row not in owner and (new := next(waiting, None)) is not None:
                number, request = new
                started = clock(engine.device)
                first, forwards = engine.admit(row, request.prompt, request.seed)
                tokens = request.limit.cut(first)
                done = request.limit.reason is not None
                seconds = clock(engine.device) - started
                if done:
                    engine.release(row)
                else:
                    text = [*request.prompt.tolist(), *first] if engine.proposer else []
                    owner[row] = _Admitted(number, request.limit, text, started)
                yield Progress(number, tokens, len(first), 0, 0, forwards, seconds, True, done)
        if not owner:
            return
        if engine.proposer is not None:
            engine.propose(owner[0].text)
        made, verified = engine.step(), engine.verified
        now = clock(engine.device)
        for row, one in list(owner.items()):
            if engine.proposer is not None:
                one.text += made[row]
            tokens = one.limit.cut(made[row])
            done = one.limit.reason is not None
            if done:
                engine.release(row)
                del owner[row]
            seconds = now - one.started
            yield Progress(
                one.number,
                tokens,
                len(made[row]),
                verified[row],
                engine.queries,
                1,
                seconds,
                False,
                done,
            )


def clock(device: torch.device) -> float:
    """Seconds, after all work queued on `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
