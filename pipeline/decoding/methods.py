"""The ways to decode, by name, and the checks that an argument can be used with a model."""

from collections.abc import Sequence

import torch
from torch import Tensor

from data_prep.errors import UserError
from pipeline.decoding.sampling import Sampling
from pipeline.decoding.step import StepShape
from pipeline.model.transformer import Transformer

METHODS = ("tidar", "ar")


def step_shape(
    model: Transformer,
    method: str,
    sampling: Sampling,
    block_size: int | None,
    blocks: Sequence[int] | None = None,
) -> StepShape:
    """The step of `method`: one token for `ar`, drafts and mask blocks for `tidar`.

    Args:
        model: what decodes.
        method: `tidar` or `ar`.
        sampling: its trust below 1 needs every block.
        block_size: K; None takes the one the model was trained with.
        blocks: numbers of the mask blocks in a step, block 1 among them; None takes all.

    Raises:
        UserError: naming the argument that cannot be used.
    """
    if method not in METHODS:
        raise UserError(f"method: unknown value {method!r}; known are {', '.join(METHODS)}")
    if method == "ar":
        return StepShape(1)
    size = block_size if block_size is not None else model.config.block_size
    if size is None:
        raise UserError("block_size: this model has none of its own; give one")
    if size < 1:
        raise UserError(f"block_size: must be at least 1, got {size}")
    if model.config.mask_token_id is None:
        raise UserError("method: this model has no mask token, so it cannot draft; use method=ar")
    if blocks is None:
        return StepShape.full(size)
    chosen = tuple(sorted(set(blocks)))
    if not chosen or chosen[0] != 1 or chosen[-1] > size:
        raise UserError(
            f"blocks: must be numbers in 1 … {size} with 1 among them, got {list(blocks)}"
        )
    if sampling.trust < 1 and len(chosen) < size:
        raise UserError("blocks: trust below 1 reads the logits of every block; leave blocks out")
    return StepShape(size, size, chosen)


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
