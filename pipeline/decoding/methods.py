"""The ways to decode, by name, and the checks that an argument can be used with a model."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.decoding.block_diffusion import block_diffusion_shape
from pipeline.decoding.proposals import DraftModel, PromptLookup, Proposer
from pipeline.decoding.sampling import Sampling
from pipeline.decoding.step import StepShape
from pipeline.model.transformer import Transformer
from tidar_common.errors import UserError

METHODS = ("tidar", "recurrent", "ar", "prompt_lookup", "speculative", "block_diffusion")
PROPOSED = ("prompt_lookup", "speculative")
"""Those whose drafts come from elsewhere."""
LOOKUP_TOKENS = 7
"""Drafts of `prompt_lookup` and `speculative`, unless `block_size` says otherwise (minus one)."""
CONFIDENCE = 0.9
"""Probability from which `block_diffusion` keeps a token, unless said otherwise."""


def step_shape(
    model: Transformer,
    method: str,
    sampling: Sampling,
    block_size: int | None,
    blocks: Sequence[int] | None = None,
) -> StepShape:
    """The step of `method`: drafts and mask blocks for `tidar`, drafts alone for `recurrent`, a
    block behind the one before for `block_diffusion`, one token for the others.

    (Where drafts come from elsewhere, they are put behind that token step by step.)

    Args:
        model: what decodes.
        method: one of `METHODS`.
        sampling: its trust below 1 needs every block.
        block_size: K; None takes the one the model was trained with.
        blocks: numbers of the mask blocks in a step; None takes all, which of a model of linear
            drafts is one.

    Raises:
        UserError: naming the argument that cannot be used.
    """
    if method not in METHODS:
        raise UserError(f"method: unknown value {method!r}; known are {', '.join(METHODS)}")
    if method != "tidar":
        if sampling.trust < 1:
            raise UserError(f"trust: below 1 needs method=tidar, got {method}")
        if method not in ("recurrent", "block_diffusion"):
            return StepShape(1)
    size = block_size if block_size is not None else model.config.block_size
    if size is None:
        raise UserError("block_size: this model has none of its own; give one")
    if size < 1:
        raise UserError(f"block_size: must be at least 1, got {size}")
    sequential = model.draft_head is not None
    if method == "recurrent":
        if not sequential:
            raise UserError(
                "method: recurrent needs a model with a draft head; train one with "
                "model.draft_rank above 0, or use another method"
            )
        return StepShape(size, size, (), sequential)
    if model.config.mask_token_id is None:
        raise UserError("method: this model has no mask token, so it cannot draft; use method=ar")
    if method == "block_diffusion":
        return block_diffusion_shape(size)
    if model.config.linear_drafts:
        return _linear_step(sampling, size, blocks)
    if blocks is None:
        return replace(StepShape.full(size), sequential=sequential)
    chosen = tuple(sorted(set(blocks)))
    if chosen and not 1 <= chosen[0] <= chosen[-1] <= size:
        raise UserError(f"blocks: must be numbers in 1 … {size}, got {list(blocks)}")
    if sampling.trust < 1 and len(chosen) < size:
        raise UserError("blocks: trust below 1 reads the logits of every block; leave blocks out")
    return StepShape(size, size, chosen, sequential)


def _linear_step(sampling: Sampling, size: int, blocks: Sequence[int] | None) -> StepShape:
    """The step of a model of linear drafts, whose one block is number 1; it may be left out."""
    chosen = (1,) if blocks is None else tuple(sorted(set(blocks)))
    if chosen not in ((), (1,)):
        raise UserError(
            f"blocks: this model has one block for all counts (linear drafts), got {list(chosen)}; "
            "leave blocks out, or give none of them with []"
        )
    if sampling.trust < 1 and not chosen:
        raise UserError("blocks: trust below 1 reads the logits of the block; leave blocks out")
    return replace(StepShape.one_block(size), blocks=chosen)


def proposer_of(
    method: str,
    sampling: Sampling,
    block_size: int | None,
    model: Transformer,
    draft_model: Transformer | None,
    max_tokens: int,
) -> Proposer | None:
    """Where the drafts of `method` come from; None where the model drafts itself, or nobody.

    Raises:
        UserError: when a draft model is missing, or the block size leaves no draft.
    """
    count = LOOKUP_TOKENS if block_size is None else block_size - 1
    if method in PROPOSED and count < 1:
        raise UserError(f"block_size: {method} needs at least 2, got {block_size}")
    if method == "prompt_lookup":
        return PromptLookup(count)
    if method != "speculative":
        return None
    if draft_model is None:
        raise UserError("draft_model: method=speculative needs a smaller model; give one")
    return DraftModel(draft_model, sampling, count, max_tokens, model.config.num_embeddings)


def prompt_tensor(
    model: Transformer, prompt_ids: Sequence[int] | Tensor, max_new_tokens: int
) -> Tensor:
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
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens: must be at least 1, got {max_new_tokens}")
    limit = model.config.max_positions
    if len(prompt) + max_new_tokens > limit:
        raise UserError(
            f"max_new_tokens: {len(prompt)} prompt tokens and {max_new_tokens} new ones exceed the "
            f"model's {limit} positions; shorten one of them"
        )
    return prompt
