"""Requests through the rows of an engine: one that is done makes room for the next at once."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from pipeline.decoding.cache import KVCache
from pipeline.decoding.graphs import WIDTH_STEP, GraphedSteps
from pipeline.decoding.proposals import Proposer
from pipeline.decoding.sampling import Sampling
from pipeline.decoding.step import PrefillRule, StepShape, prefill_mask
from pipeline.decoding.text import Limit
from pipeline.model.attention import as_bias
from pipeline.model.transformer import Transformer

SMALLEST_PIECE = 32
"""Tokens that a captured piece of a prompt is at least filled up to."""


class Engine(ABC):
    """A batch of rows, each decoding a request of its own; what a step is, the kinds of it say.

    Args:
        model: in evaluation mode.
        sampling: how tokens are drawn; each request has its own seed.
        shape: a row's largest step.
        batch_size: rows.
        room: tokens of the longest row in the cache, a step's queries among them.
        graphs: capture steps as CUDA graphs; only on a GPU.
        prefill_chunk: most prompt tokens in one forward.
    """

    proposer: Proposer | None = None
    """Where drafts come from, if from elsewhere than the model."""

    def __init__(
        self,
        model: Transformer,
        sampling: Sampling,
        shape: StepShape,
        *,
        batch_size: int,
        room: int,
        graphs: bool,
        prefill_chunk: int,
    ) -> None:
        first = next(model.parameters())
        self.model, self.sampling, self.shape = model, sampling, shape
        room = -(-room // WIDTH_STEP) * WIDTH_STEP if first.is_cuda else room
        self.forward = model.for_decoding(room)
        self.device, self.batch_size, self.prefill_chunk = first.device, batch_size, prefill_chunk
        self._graphs: Callable[[Hashable, Callable[[], Tensor]], Tensor] | None = None
        # The code of transformers may ask the device for values, which no capture survives.
        if graphs and self.device.type == "cuda" and model.config.hosted is None:
            self._graphs = GraphedSteps(self.device)
        ragged = batch_size > 1 or self._graphs is not None
        with torch.inference_mode():
            self.cache = KVCache(
                model.config, room, dtype=first.dtype, device=self.device,
                batch_size=batch_size, ragged=ragged,
            )  # fmt: skip
        self._pieces: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        """Tokens and their number, read by captured pieces of prompts, by tokens and slots."""
        self.verified = [0] * batch_size
        """Drafts that each row's last step had to verify."""
        self.queries = 0
        """Query tokens of a row in the last step."""

    @abstractmethod
    def admit(self, row: int, prompt: Tensor, seed: int) -> tuple[list[int], int]:
        """Read a prompt, int64 [N], into `row`; the tokens that are final at once, and the forwards
        it took."""

    def propose(self, text: Sequence[int]) -> None:  # noqa: B027 (a hook)
        """Let the proposer draft what follows `text`, prompt included; nothing without one."""

    @abstractmethod
    def step(self) -> list[list[int]]:
        """One forward: the tokens that became final in each row, perhaps none."""

    def release(self, row: int) -> None:  # noqa: B027 (a hook)
        """The row's request is done: it stays idle until the next is admitted."""

    def _read(self, row: int, prompt: Tensor, slots: Tensor) -> tuple[Tensor, int]:
        """Read a prompt, int64 [N], into `row`, in pieces; with the last go `slots`, int64 [1, M].

        Returns:
            Hidden states of the last token and the slots, [1, 1 + M, E], and the forwards it took.
        """
        self.cache.set_length(row, 0)
        pieces, none = prompt.split(self.prefill_chunk), slots[:, :0]
        for piece in pieces[:-1]:
            self._read_piece(row, piece, none)
        return self._read_piece(row, pieces[-1], slots), len(pieces)

    def _read_piece(self, row: int, piece: Tensor, slots: Tensor) -> Tensor:
        """One forward of `piece` [n] and `slots` [1, M] behind what `row` has kept; the hidden
        states of the last token and the slots."""
        kept, count, behind = self.cache.lengths[row], len(piece), slots.shape[1]
        size = min(1 << (count - 1).bit_length(), max(self.prefill_chunk, count))
        size = max(size, min(SMALLEST_PIECE, self.prefill_chunk))
        # Pieces of few sizes are captured once each; where their filling has no room, as they are.
        if self._captures_prompts and kept + size + behind <= self.cache.capacity:
            hidden = self._read_filled(piece, slots, size)
        else:
            cache = self.cache.row(row)
            queries = torch.cat([piece[None], slots], dim=1)
            mask = prefill_mask(kept, count, behind, self.device, self.model.config.causal_slots)
            where = kept + torch.arange(count + behind, device=self.device)
            bias = as_bias(mask, self.cache.dtype)
            hidden = self.forward.hidden(queries, where, bias, cache, clean=count)[:, count - 1 :]
        self.cache.set_length(row, kept + count)
        return hidden

    @property
    def _captures_prompts(self) -> bool:
        """Whether prompts are read in pieces of few sizes; only with one row, whose memory is that
        of the whole cache."""
        ragged = self.cache.device_lengths is not None
        return self._graphs is not None and ragged and self.batch_size == 1

    def _read_filled(self, piece: Tensor, slots: Tensor, size: int) -> Tensor:
        """`_read_piece` of the only row, as a forward of fixed shape: `piece` is filled up to
        `size` tokens, whose keys and values the next forward overwrites."""
        assert self._graphs is not None
        key = size, slots.shape[1]
        if key not in self._pieces:
            ids = torch.zeros(1, size + key[1], dtype=torch.int64, device=self.device)
            ids[:, size:] = slots
            count = torch.zeros((), dtype=torch.int64, device=self.device)
            self._pieces[key] = ids, count
        ids, count = self._pieces[key]
        ids[0, : len(piece)] = piece
        count.fill_(len(piece))
        causal, cache = self.model.config.causal_slots, self.cache
        cache.make_room(size + key[1], WIDTH_STEP)

        def forward() -> Tensor:
            rule = PrefillRule(count, size, key[1], cache.dtype, causal)
            where = cache.positions(rule.offsets)
            assert cache.device_lengths is not None, "captured forwards read lengths there"
            bias = rule.over_lengths(cache.device_lengths, cache.columns)
            return self.forward.hidden(ids, where, bias, cache, clean=size)[:, rule.rows]

        return self._graphs((*key, cache.width), forward)

    def _run(self, shape: StepShape, advance: Callable[[], Tensor]) -> Tensor:
        """The result of `advance`, a forward of `shape`; captured where steps are."""
        self.queries = shape.num_queries
        if self._graphs is None:
            self.cache.make_room(shape.num_queries)
            return advance()
        self.cache.make_room(shape.num_queries, WIDTH_STEP)
        return self._graphs((self.shape, shape, self.cache.width), advance)


@dataclass
class Generation:
    """What came of one prompt."""

    tokens: list[int] = field(default_factory=list)
    """New token ids, the end token included when it was reached."""
    forwards: int = 0
    """Forward passes, those of the prompt included (one for each `prefill_chunk` tokens)."""
    accepted: list[int] = field(default_factory=list)
    """Tokens made final by each step after the prompt: drafts accepted, d_0 among them, 1 … K;
    none for ar."""
    drafts: list[int] = field(default_factory=list)
    """Drafts that each of these steps had to verify, 0 … K - 1."""
    steps: list[tuple[int, float]] = field(default_factory=list)
    """Query tokens and seconds of every forward after the prompt."""
    forward_of_token: list[int] = field(default_factory=list)
    """The forward, counted from 0, that made each token of `tokens` final."""
    seconds: float = 0.0
    """From reading the prompt to the last token; rows of a batch share the clock."""
    prefill_seconds: float = 0.0
    """The part of it in which the prompt was read and the first token made."""
    prefill_forwards: int = 0
    prefill_tokens: int = 0
    """New tokens that came with the prompt's last forward."""
    stopped_by: str = "length"
    """`length`, `eos` or `stop` (a stop string)."""
    text: str | None = None
    """With stop strings: the new text, cut before the string that ended it."""

    @property
    def tokens_per_forward(self) -> float:
        """T/NFE, the prompt's forwards included."""
        return len(self.tokens) / max(self.forwards, 1)


@dataclass
class Request:
    """One prompt, how it is continued, and what came of it so far."""

    number: int
    """Among the requests."""
    prompt: Tensor
    """int64 [N]"""
    seed: int
    limit: Limit
    counts_drafts: bool = True
    result: Generation = field(default_factory=Generation)
    _started: float = 0.0

    @property
    def done(self) -> bool:
        return self.limit.reason is not None

    @cached_property
    def _prompt_ids(self) -> list[int]:
        ids: list[int] = self.prompt.tolist()
        return ids

    @property
    def ids(self) -> list[int]:
        """Prompt and new tokens."""
        return [*self._prompt_ids, *self.result.tokens]

    def begin(self, engine: Engine, row: int) -> list[int]:
        """Read the prompt; the new tokens that count."""
        self._started = clock(engine.device)
        tokens, forwards = engine.admit(row, self.prompt, self.seed)
        result = self.result
        result.prefill_forwards = result.forwards = forwards
        result.seconds = result.prefill_seconds = clock(engine.device) - self._started
        counted = self._count(tokens)
        result.prefill_tokens = len(counted)
        return counted

    def go_on(self, engine: Engine, row: int, tokens: list[int], now: float) -> list[int]:
        """Count a step that made `tokens` final in its `row`; those that count."""
        result, seconds = self.result, now - self._started
        result.forwards += 1
        result.steps.append((engine.queries, seconds - result.seconds))
        result.seconds = seconds
        if self.counts_drafts:
            result.accepted.append(len(tokens))
            result.drafts.append(engine.verified[row])
        return self._count(tokens)

    def _count(self, tokens: list[int]) -> list[int]:
        counted = self.limit.cut(tokens)
        self.result.forward_of_token += [self.result.forwards - 1] * len(counted)
        self.result.tokens += counted
        if self.limit.reason is not None:
            self.result.stopped_by = self.limit.reason
            self.result.text = self.limit.text()
        return counted


def decode_requests(
    engine: Engine, requests: Iterable[Request]
) -> Iterator[tuple[Request, list[int]]]:
    """Decode all requests, at most `engine.batch_size` at a time; after each forward every request
    in it, with its new tokens.

    Which requests stand beside a request does not change its tokens, but to rounding. A request
    is taken when a row is free for it, so that `requests` may be made on the way.
    """
    waiting = iter(requests)
    running: dict[int, Request] = {}
    while True:
        for row in range(engine.batch_size):
            while row not in running and (request := next(waiting, None)) is not None:
                tokens = request.begin(engine, row)
                if request.done:
                    engine.release(row)
                else:
                    running[row] = request
                yield request, tokens
        if not running:
            return
        if engine.proposer is not None:
            engine.propose(running[0].ids)
        final = engine.step()
        now = clock(engine.device)
        for row, request in list(running.items()):
            tokens = request.go_on(engine, row, final[row], now)
            if request.done:
                engine.release(row)
                del running[row]
            yield request, tokens


def clock(device: torch.device) -> float:
    """Seconds, after all work queued on `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
