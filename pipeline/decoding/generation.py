"""`generate`: a prompt in, new tokens out; many at once, or as they come."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor

from pipeline.decoding.batch import Engine, Generation, Request, decode_requests
from pipeline.decoding.block_diffusion import BlockDiffusionEngine
from pipeline.decoding.choice import ChoosingEngine
from pipeline.decoding.engine import StepEngine
from pipeline.decoding.latency import latency_curve
from pipeline.decoding.options import DecodeOptions
from pipeline.decoding.proposals import proposer_of
from pipeline.decoding.text import Limit
from pipeline.model.transformer import Transformer
from tidar_common.errors import UserError

Prompt = Sequence[int] | Tensor
"""Token ids, [N], N >= 1."""


def generate(
    model: Transformer,
    prompt_ids: Prompt,
    *,
    method: str = "tidar",
    block_size: int | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    trust: float = 1.0,
    eos_id: int | None = None,
    **options: Any,
) -> Generation:
    """Continue `prompt_ids` by up to `max_new_tokens` tokens.

    Args:
        model: a `Transformer`; for `tidar` one that knows its mask token.
        prompt_ids: token ids, [N], N >= 1.
        method: as in `DecodeOptions`, and so are all others that are not said here.
        block_size: see there.
        max_new_tokens: at least 1.
        temperature: 0 is greedy.
        seed: of the verifier's and the drafter's independent random streams.
        trust: weight of the AR logits in the target, in [0, 1]; 1 is lossless: greedy output equals
            that of `ar`, sampled output has the same distribution.
        eos_id: stop after this token; None never stops early.
        **options: fields of `Sampling` and of `DecodeOptions`.

    Raises:
        UserError: for arguments out of range, a model without a mask token, or a prompt that does
            not fit the model's `max_positions`.
    """
    whole = DecodeOptions.of(
        method=method, block_size=block_size, max_new_tokens=max_new_tokens,
        temperature=temperature, seed=seed, trust=trust, eos_id=eos_id, **options,
    )  # fmt: skip
    return generate_batch(model, [prompt_ids], whole)[0]


def generate_batch(
    model: Transformer,
    prompts: Sequence[Prompt],
    options: DecodeOptions,
    *,
    seeds: Sequence[int] | None = None,
) -> list[Generation]:
    """Continue many prompts, `options.batch_size` side by side.

    Rows accept, stop and begin independently of each other; a request's tokens are those that it
    gets alone, but for rounding. `seeds` gives each prompt its own; None counts up from the
    sampling's seed.
    """
    if not prompts:
        return []
    engine, tensors = open_engine(model, prompts, options)
    finished = dict(finish_each(engine, tensors, options, seeds=seeds))
    return [finished[number] for number in range(len(tensors))]


def stream(model: Transformer, prompt_ids: Prompt, options: DecodeOptions) -> Iterator[list[int]]:
    """The new tokens of each forward, as they come.

    Where the prompt is read in pieces, those before the last give none. The engine is opened at
    once, with whatever it measures, so that a clock may start before the first forward.
    """
    engine, prompts = open_engine(model, [prompt_ids], options)

    def forwards() -> Iterator[list[int]]:
        for request, tokens in decode_requests(engine, requests_of(prompts, options)):
            if not request.result.steps:
                yield from ([] for _ in range(request.result.prefill_forwards - 1))
            yield tokens

    return forwards()


def finish_each(
    engine: Engine,
    prompts: Iterable[Tensor],
    options: DecodeOptions,
    *,
    seeds: Sequence[int] | None = None,
) -> Iterator[tuple[int, Generation]]:
    """Decode `prompts`, each taken when a row is free for it; index and generation of each as soon
    as it is done."""
    for request, _ in decode_requests(engine, requests_of(prompts, options, seeds)):
        if request.done:
            yield request.number, request.result


def requests_of(
    prompts: Iterable[Tensor], options: DecodeOptions, seeds: Sequence[int] | None = None
) -> Iterator[Request]:
    """A request for each of `prompts`, int64 [N], when it is asked for."""
    numbers = count(options.sampling.seed) if seeds is None else iter(seeds)
    for number, prompt in enumerate(prompts):
        watch = None if options.stop is None else options.stop.watch(prompt.tolist())
        limit = Limit(options.max_new_tokens, options.eos_id, watch)
        yield Request(number, prompt, next(numbers), limit, options.traits.verifies)


def open_engine(
    model: Transformer, prompts: Sequence[Prompt], options: DecodeOptions
) -> tuple[Engine, list[Tensor]]:
    """An engine with room for every prompt, and the prompts, checked, on its device.

    It may run any number of requests: cache and captured graphs are made once.
    """
    shape, sampling = options.step_shape(model), options.sampling
    tensors = [prompt_tensor(model, prompt, options.max_new_tokens) for prompt in prompts]
    capacity = max(map(len, tensors)) + options.max_new_tokens
    room: dict[str, Any] = {
        "capacity": capacity,
        "graphs": options.cuda_graphs,
        "prefill_chunk": options.prefill_chunk,
    }
    if options.method == "block_diffusion":
        confidence = options.confidence
        return BlockDiffusionEngine(model, sampling, shape, confidence=confidence, **room), tensors
    room["batch_size"] = min(options.batch_size, len(tensors))
    if options.chooses_step:
        curve = latency_curve(model)
        engine = ChoosingEngine(
            model, sampling, shape.block_size, curve, on_choice=options.on_choice, **room
        )
        return engine, tensors
    proposer = proposer_of(options, model, capacity)
    return StepEngine(model, sampling, shape, proposer=proposer, **room), tensors


def prompt_tensor(model: Transformer, prompt_ids: Prompt, max_new_tokens: int) -> Tensor:
    """`prompt_ids` as int64 [N] on the model's device.

    Raises:
        UserError: when it is empty, holds ids the model does not have, or is too long.
    """
    device = next(model.parameters()).device
    prompt = torch.as_tensor(prompt_ids, dtype=torch.int64, device=device)
    if prompt.ndim != 1 or len(prompt) == 0:
        raise UserError("prompt: is empty; give at least one token, for instance the bos token")
    lowest, highest = int(prompt.min()), int(prompt.max())
    if lowest < 0 or highest >= model.config.num_embeddings:
        raise UserError(
            f"prompt: holds token {lowest if lowest < 0 else highest}, the model has "
            f"{model.config.num_embeddings} embeddings; use the model's own tokenizer"
        )
    limit = model.config.max_positions
    if len(prompt) + max_new_tokens > limit:
        raise UserError(
            f"max_new_tokens: {len(prompt)} prompt tokens and {max_new_tokens} new ones exceed the "
            f"model's {limit} positions; shorten one of them"
        )
    return prompt
