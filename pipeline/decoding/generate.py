"""`generate`: one prompt in, new tokens out, by either method; `stream` gives them as they come."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from data_prep.errors import UserError
from pipeline.decoding.autoregressive import decode_ar
from pipeline.decoding.cache import KVCache
from pipeline.decoding.sampling import Sampling
from pipeline.decoding.tidar import decode_tidar, room_needed
from pipeline.model.transformer import Transformer

METHODS = ("tidar", "ar")


@dataclass
class Generation:
    """What one call of `generate` produced."""

    tokens: list[int] = field(default_factory=list)
    """New token ids, the end token included when it was reached."""
    forwards: int = 0
    """Forward passes, that of the prompt included."""
    accepted: list[int] = field(default_factory=list)
    """Drafts accepted in each step after the first forward, 1 … K (d_0 always is); none for ar."""
    forward_of_token: list[int] = field(default_factory=list)
    """The forward, counted from 0, that made each token of `tokens` final."""
    seconds: float = 0.0

    @property
    def tokens_per_forward(self) -> float:
        """T/NFE, the prompt's forward included."""
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
) -> Generation:
    """Continue `prompt_ids` by up to `max_new_tokens` tokens.

    Args:
        model: a `Transformer`; for `tidar` one that knows its mask token.
        prompt_ids: token ids, [N], N >= 1.
        method: `tidar`, or `ar` for one token a forward.
        block_size: K; None takes the one the model was trained with.
        max_new_tokens: at least 1.
        temperature: 0 is greedy.
        seed: of the verifier's and the drafter's independent random streams.
        trust: weight of the AR logits in the target, in [0, 1]; 1 is lossless: greedy output equals
            that of `ar`, sampled output has the same distribution.
        eos_id: stop after this token; None never stops early.

    Raises:
        UserError: for arguments out of range, a model without a mask token, or a prompt that does
            not fit the model's `max_positions`.
    """
    result = Generation()
    started = _clock(model)
    steps = stream(
        model,
        prompt_ids,
        method=method,
        block_size=block_size,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature=temperature, trust=trust, seed=seed),
        eos_id=eos_id,
    )
    for number, (tokens, proposed) in enumerate(steps):
        result.tokens += tokens
        result.forward_of_token += [number] * len(tokens)
        if method == "tidar" and number > 0:
            result.accepted.append(proposed)
    result.forwards = number + 1
    result.seconds = _clock(model) - started
    return result


@torch.inference_mode()
def stream(
    model: Transformer,
    prompt_ids: Sequence[int] | Tensor,
    *,
    method: str = "tidar",
    block_size: int | None = None,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    eos_id: int | None = None,
) -> Iterator[tuple[list[int], int]]:
    """Yield, for each forward, its new tokens and how many it made before the limits cut them."""
    sampling = sampling or Sampling()
    device = next(model.parameters()).device
    prompt = torch.as_tensor(prompt_ids, dtype=torch.int64, device=device)
    size = _block_size(model, block_size) if method == "tidar" else 1
    _check(model, prompt, method, max_new_tokens)
    cache = KVCache(
        model.config,
        room_needed(len(prompt), max_new_tokens, size),
        dtype=next(model.parameters()).dtype,
        device=device,
    )
    if method == "tidar":
        mask_token_id = model.config.mask_token_id
        assert mask_token_id is not None, "checked by _check"
        steps = decode_tidar(
            model, prompt, cache, sampling, block_size=size, mask_token_id=mask_token_id
        )
    else:
        steps = decode_ar(model, prompt, cache, sampling)
    remaining = max_new_tokens
    # Each forward makes at least one token final, so there are at most `max_new_tokens` of them.
    for tokens in islice(steps, max_new_tokens):
        made = len(tokens)
        tokens = tokens[:remaining]
        if eos_id is not None and eos_id in tokens:
            tokens = tokens[: tokens.index(eos_id) + 1]
            remaining = 0
        else:
            remaining -= len(tokens)
        yield tokens, made
        if remaining == 0:
            return


def _block_size(model: Transformer, block_size: int | None) -> int:
    size = block_size if block_size is not None else model.config.block_size
    if size is None:
        raise UserError("block_size: this model has none of its own; give one")
    if size < 1:
        raise UserError(f"block_size: must be at least 1, got {size}")
    return size


def _check(model: Transformer, prompt: Tensor, method: str, max_new_tokens: int) -> None:
    if method not in METHODS:
        raise UserError(f"method: unknown value {method!r}; known are {', '.join(METHODS)}")
    if method == "tidar" and model.config.mask_token_id is None:
        raise UserError("method: this model has no mask token, so it cannot draft; use method=ar")
    if prompt.ndim != 1 or len(prompt) == 0:
        raise UserError("prompt: is empty; give at least one token, for instance the bos token")
    if int(prompt.min()) < 0 or int(prompt.max()) >= model.config.num_embeddings:
        raise UserError(
            f"prompt: holds token {int(prompt.max())}, the model has "
            f"{model.config.num_embeddings} embeddings; use the model's own tokenizer"
        )
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens: must be at least 1, got {max_new_tokens}")
    limit = model.config.max_positions
    if len(prompt) + max_new_tokens > limit:
        raise UserError(
            f"max_new_tokens: {len(prompt)} prompt tokens and {max_new_tokens} new ones exceed the "
            f"model's {limit} positions; shorten one of them"
        )


def _clock(model: Transformer) -> float:
    """Seconds, after all work queued on the model's device is done."""
    if next(model.parameters()).device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
