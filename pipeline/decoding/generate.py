"""`generate`: prompts in, new tokens out, by either method; `stream` gives them as they come."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from torch import Tensor

from pipeline.decoding.automatic import AutomaticEngine
from pipeline.decoding.batch import Engine, Request, decode_requests
from pipeline.decoding.block_diffusion import BlockDiffusionEngine
from pipeline.decoding.choice import Choice
from pipeline.decoding.engine import StepEngine
from pipeline.decoding.latency import latency_curve
from pipeline.decoding.methods import CONFIDENCE, prompt_tensor, proposer_of, step_shape
from pipeline.decoding.sampling import Sampling
from pipeline.decoding.stops import Limit, StopStrings, StopWatch
from pipeline.model.transformer import Transformer
from tidar_common.errors import UserError

Blocks = Sequence[int] | str | None
"""Mask blocks in a step: their numbers, None for all, or `auto`."""
PREFILL_CHUNK = 512
"""Prompt tokens in one forward, unless said otherwise."""


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


def generate(
    model: Transformer,
    prompt_ids: Sequence[int] | Tensor,
    *,
    method: str = "tidar",
    block_size: int | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    trust: float = 1.0,
    eos_id: int | None = None,
    top_k: int | None = None,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    stop: StopStrings | None = None,
    blocks: Blocks = None,
    prefill_chunk: int = PREFILL_CHUNK,
    cuda_graphs: bool = True,
    draft_model: Transformer | None = None,
    confidence: float = CONFIDENCE,
) -> Generation:
    """Continue `prompt_ids` by up to `max_new_tokens` tokens.

    Args:
        model: a `Transformer`; for `tidar` one that knows its mask token.
        prompt_ids: token ids, [N], N >= 1.
        method: `tidar`, `ar` for one token a forward, `recurrent` (the draft head alone, without
            mask blocks), `prompt_lookup` (drafts are what followed the last few tokens before),
            `speculative` (drafts of a smaller model), or `block_diffusion` (unmasking without
            verification: its text is not that of `ar`).
        block_size: K; None takes the one the model was trained with.
        max_new_tokens: at least 1.
        temperature: 0 is greedy.
        seed: of the verifier's and the drafter's independent random streams.
        trust: weight of the AR logits in the target, in [0, 1]; 1 is lossless: greedy output equals
            that of `ar`, sampled output has the same distribution.
        eos_id: stop after this token; None never stops early.
        top_k: as in `Sampling`, and so are `top_p` and `repetition_penalty`.
        top_p: see there.
        repetition_penalty: see there.
        stop: strings that end the generation; `Generation.text` is cut before them.
        blocks: mask blocks in a step; None takes all K; `auto` chooses block size and blocks
            while decoding (`pipeline.decoding.automatic`), up to the block size given. It changes
            speed and forwards; greedy output never, sampled output only in the draw, not its
            distribution.
        prefill_chunk: most prompt tokens in one forward.
        cuda_graphs: on a GPU, capture the steps.
        draft_model: for `speculative`, a smaller model with the same tokenizer.
        confidence: for `block_diffusion`, the probability from which a token is kept, in (0, 1].

    Raises:
        UserError: for arguments out of range, a model without a mask token, or a prompt that does
            not fit the model's `max_positions`.
    """
    sampling = Sampling(
        temperature=temperature,
        trust=trust,
        seed=seed,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
    )
    return generate_batch(
        model,
        [prompt_ids],
        method=method,
        block_size=block_size,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seeds=[seed],
        eos_id=eos_id,
        stop=stop,
        blocks=blocks,
        prefill_chunk=prefill_chunk,
        cuda_graphs=cuda_graphs,
        draft_model=draft_model,
        confidence=confidence,
    )[0]


def generate_batch(
    model: Transformer,
    prompts: Sequence[Sequence[int] | Tensor],
    *,
    batch_size: int = 1,
    method: str = "tidar",
    block_size: int | None = None,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    seeds: Sequence[int] | None = None,
    eos_id: int | None = None,
    stop: StopStrings | None = None,
    blocks: Blocks = None,
    prefill_chunk: int = PREFILL_CHUNK,
    cuda_graphs: bool = True,
    draft_model: Transformer | None = None,
    confidence: float = CONFIDENCE,
) -> list[Generation]:
    """Continue many prompts, `batch_size` side by side; arguments as in `generate`.

    Rows accept, stop and begin independently of each other; a request's tokens are those that it
    gets alone, but for rounding. `seeds` gives each prompt its own; None counts up from the
    sampling's seed.
    """
    sampling = sampling or Sampling()
    results = [Generation() for _ in prompts]
    if not prompts:
        return results
    engine, tensors = open_engine(
        model,
        prompts,
        batch_size=batch_size,
        method=method,
        block_size=block_size,
        blocks=blocks,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        prefill_chunk=prefill_chunk,
        cuda_graphs=cuda_graphs,
        draft_model=draft_model,
        confidence=confidence,
    )
    return run_engine(
        engine,
        tensors,
        seeds=seeds,
        max_new_tokens=max_new_tokens,
        eos_id=eos_id,
        stop=stop,
        count_accepted=method not in ("ar", "block_diffusion"),
    )


def open_engine(
    model: Transformer,
    prompts: Sequence[Sequence[int] | Tensor],
    *,
    batch_size: int = 1,
    method: str = "tidar",
    block_size: int | None = None,
    blocks: Blocks = None,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    cuda_graphs: bool = True,
    draft_model: Transformer | None = None,
    confidence: float = CONFIDENCE,
    on_choice: Callable[[Choice], None] = lambda choice: None,
) -> tuple[Engine, list[Tensor]]:
    """An engine with room for every prompt, and the prompts, checked, on its device.

    It may run any number of requests, one `run_engine` after the other: cache and captured graphs
    are made once. `on_choice` is told what `blocks="auto"` comes to.
    """
    sampling = sampling or Sampling()
    if batch_size < 1:
        raise UserError(f"batch_size: must be at least 1, got {batch_size}")
    if prefill_chunk < 1:
        raise UserError(f"prefill_chunk: must be at least 1, got {prefill_chunk}")
    if not 0 < confidence <= 1:
        raise UserError(f"confidence: must be above 0 and at most 1, got {confidence}")
    automatic = _is_automatic(blocks, method, sampling)
    numbers = None if isinstance(blocks, str) else blocks
    shape = step_shape(model, method, sampling, block_size, numbers)
    tensors = [prompt_tensor(model, prompt, max_new_tokens) for prompt in prompts]
    capacity = max(map(len, tensors)) + max_new_tokens
    proposer = proposer_of(method, sampling, block_size, model, draft_model, capacity)
    if batch_size > 1 and (proposer is not None or method == "block_diffusion"):
        raise UserError(f"batch_size: method={method} decodes one prompt at a time; use 1")
    if batch_size > 1 and shape.drafting and not shape.sequential and 1 not in shape.blocks:
        raise UserError("blocks: a batch needs block 1, for rows that have no draft; add it")
    room: dict[str, Any] = {
        "capacity": capacity,
        "graphs": cuda_graphs,
        "prefill_chunk": prefill_chunk,
    }
    if method == "block_diffusion":
        size = shape.block_size
        return BlockDiffusionEngine(model, sampling, size, confidence=confidence, **room), tensors
    rows = min(batch_size, len(tensors))
    if automatic:
        curve = latency_curve(model)
        return AutomaticEngine(
            model, sampling, shape.block_size, curve, batch_size=rows, chosen=on_choice, **room
        ), tensors
    return StepEngine(model, sampling, shape, batch_size=rows, proposer=proposer, **room), tensors


def _is_automatic(blocks: Blocks, method: str, sampling: Sampling) -> bool:
    """Whether the step is chosen while decoding; raises UserError where that cannot be."""
    if not isinstance(blocks, str):
        return False
    if blocks != "auto":
        raise UserError(f"blocks: unknown value {blocks!r}; give numbers, auto, or none for all")
    if method == "tidar" and sampling.trust < 1:
        raise UserError("blocks: trust below 1 reads the logits of every block; leave blocks out")
    return method == "tidar"


def run_engine(
    engine: Engine,
    prompts: Sequence[Tensor],
    *,
    seeds: Sequence[int] | None = None,
    max_new_tokens: int = 128,
    eos_id: int | None = None,
    stop: StopStrings | None = None,
    count_accepted: bool = True,
) -> list[Generation]:
    """Decode `prompts` with an engine that has room for them."""
    finished = dict(
        finish_each(
            engine,
            prompts,
            seeds=seeds,
            max_new_tokens=max_new_tokens,
            eos_id=eos_id,
            stop=stop,
            count_accepted=count_accepted,
        )
    )
    return [finished[number] for number in range(len(prompts))]


def finish_each(
    engine: Engine,
    prompts: Iterable[Tensor],
    *,
    seeds: Sequence[int] | None = None,
    max_new_tokens: int = 128,
    eos_id: int | None = None,
    stop: StopStrings | None = None,
    count_accepted: bool = True,
) -> Iterator[tuple[int, Generation]]:
    """Decode `prompts`, each taken when a row is free for it; index and generation of each as soon
    as it is done."""
    own_seeds = count(engine.sampling.seed) if seeds is None else iter(seeds)
    stop_ids = [] if eos_id is None else [eos_id]
    limits: dict[int, tuple[Limit, StopWatch | None]] = {}

    def requests() -> Iterator[Request]:
        for number, prompt in enumerate(prompts):
            watch = None if stop is None else stop.watch(prompt.tolist())
            limits[number] = Limit(max_new_tokens, stop_ids, watch), watch
            yield Request(prompt, next(own_seeds), limits[number][0])

    open_results: dict[int, Generation] = {}
    for progress in decode_requests(engine, requests()):
        number = progress.request
        result = open_results.setdefault(number, Generation())
        result.forwards += progress.forwards
        result.forward_of_token += [result.forwards - 1] * len(progress.tokens)
        result.tokens += progress.tokens
        if not progress.prefill:
            result.steps.append((progress.queries, progress.seconds - result.seconds))
        result.seconds = progress.seconds
        if progress.prefill:
            result.prefill_seconds = progress.seconds
            result.prefill_forwards = progress.forwards
            result.prefill_tokens = len(progress.tokens)
        elif count_accepted:
            result.accepted.append(progress.made)
            result.drafts.append(progress.drafts)
        if progress.done:
            limit, watch = limits.pop(number)
            result.stopped_by = limit.reason or "length"
            if watch is not None:
                result.text = watch.text if result.stopped_by == "stop" else watch.finish()
            yield number, open_results.pop(number)


def stream(
    model: Transformer,
    prompt_ids: Sequence[int] | Tensor,
    *,
    method: str = "tidar",
    block_size: int | None = None,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    eos_id: int | None = None,
    stop: StopStrings | None = None,
    blocks: Blocks = None,
    prefill_chunk: int = PREFILL_CHUNK,
    cuda_graphs: bool = True,
    draft_model: Transformer | None = None,
    confidence: float = CONFIDENCE,
    on_choice: Callable[[Choice], None] = lambda choice: None,
) -> Iterator[tuple[list[int], int]]:
    """Yield, for each forward, its new tokens and how many it made before the limits cut them.

    Where the prompt is read in pieces, those before the last give no token: ([], 0).
    """
    sampling = sampling or Sampling()
    engine, (prompt,) = open_engine(
        model,
        [prompt_ids],
        method=method,
        block_size=block_size,
        blocks=blocks,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        prefill_chunk=prefill_chunk,
        cuda_graphs=cuda_graphs,
        draft_model=draft_model,
        confidence=confidence,
        on_choice=on_choice,
    )
    watch = None if stop is None else stop.watch(prompt.tolist())
    limit = Limit(max_new_tokens, [] if eos_id is None else [eos_id], watch)
    for progress in decode_requests(engine, [Request(prompt, sampling.seed, limit)]):
        for _ in range(progress.forwards - 1):
            yield [], 0
        yield progress.tokens, progress.made
