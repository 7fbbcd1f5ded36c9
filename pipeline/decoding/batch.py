"""Requests through a batch: a row that is done makes room for the next request at once."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.decoding.engine import StepEngine
from pipeline.decoding.stops import Limit


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
    """How many it made before the limits cut them; drafts accepted, in a step."""
    forwards: int
    """1, or the number of pieces in which the prompt was read."""
    seconds: float
    """Since the request was admitted."""
    prefill: bool
    done: bool


def decode_requests(engine: StepEngine, requests: Sequence[Request]) -> Iterator[Progress]:
    """Decode all requests, at most `engine.batch_size` at a time; progress as it comes.

    Which requests stand beside a request does not change its tokens, but to rounding.
    """
    waiting = list(range(len(requests)))[::-1]
    owner: dict[int, int] = {}
    texts = [request.prompt.tolist() if engine.proposer else [] for request in requests]
    started: dict[int, float] = {}
    while waiting or owner:
        for row in range(engine.batch_size):
            while row not in owner and waiting:
                number = waiting.pop()
                request = requests[number]
                started[number] = clock(engine.device)
                token, forwards = engine.admit(row, request.prompt, request.seed)
                tokens = request.limit.cut([token])
                done = request.limit.reason is not None
                seconds = clock(engine.device) - started[number]
                if done:
                    engine.release(row)
                else:
                    owner[row] = number
                    texts[number].append(token)
                yield Progress(number, tokens, 1, forwards, seconds, True, done)
        if not owner:
            continue
        if engine.proposer is not None:
            engine.propose(texts[owner[0]])
        made = engine.step()
        now = clock(engine.device)
        for row, number in list(owner.items()):
            limit = requests[number].limit
            texts[number] += made[row]
            tokens = limit.cut(made[row])
            done = limit.reason is not None
            if done:
                engine.release(row)
                del owner[row]
            seconds = now - started[number]
            yield Progress(number, tokens, len(made[row]), 1, seconds, False, done)


def clock(device: torch.device) -> float:
    """Seconds, after all work queued on `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
