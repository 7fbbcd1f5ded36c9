"""Weights on disk, whatever wrote them, and copying them into a model without a second copy."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_prep.tokenizers.load import Tokenizer
from pipeline.model.config import ModelConfig
from pipeline.model.draft_record import DraftRecord
from pipeline.model.parameters import Opening, full_shape, is_drafting, whole
from pipeline.model.transformer import Transformer
from tidar_common.errors import UserError
from tidar_common.progress import doing

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
BY_TOKEN = (EMBEDDING, HEAD, "draft_head.up.weight")
"""Matrices with a row for each token."""


@dataclass(frozen=True)
class NamedWeight:
    """One tensor of a model on disk."""

    name: str
    file: Path
    """Where it stands, for messages."""
    shape: torch.Size
    read: Callable[[], Tensor]
    """Only called where the values are needed."""


@dataclass(frozen=True)
class SavedModel:
    """A folder that holds a model: a training checkpoint, an export or a Hugging Face folder."""

    folder: Path
    config: ModelConfig
    dtype: torch.dtype
    """Of the weights; for a training checkpoint the precision of its forward passes."""
    weights: Callable[[torch.dtype], Iterator[NamedWeight]]
    """The tensors one after another. The argument is the type they will be cast to, which
    decides between a checkpoint's bf16 weights and its fp32 master weights; casting is left to the
    caller."""
    tokenizer: Callable[[], Tokenizer]
    progress: dict[str, Any] | None = None
    """`step` and `tokens` of the training run, where they are known."""
    draft_record: DraftRecord | None = None
    remark: str = ""
    """What a user should know of the weights."""

    def __str__(self) -> str:
        """One line on what it is."""
        config, dtype = self.config, str(self.dtype).removeprefix("torch.")
        runs = "the compact transformer" if config.hosted is None else "transformers"
        return (
            f"{self.folder}, {config.family} architecture run by {runs}, "
            f"{config.num_parameters:,} parameters in {dtype}, "
            f"{config.num_embeddings:,} rows of tokens, up to {config.max_positions:,} positions"
            f"{self.remark}"
        )


def fill(
    model: Transformer, source: SavedModel, opened: Opening = whole, fresh: Collection[str] = ()
) -> None:
    """Copy `source`'s weights into `model`, one tensor at a time; it need not hold those that are
    to start `fresh`.

    The embedding matrices of `model` may have more rows than those of the source; the rows that
    have no counterpart are left as they are. A process that does not write reads nothing.

    Raises:
        UserError: naming tensor and file when one is unknown, missing, of another shape, or holds
            values that are not finite.
    """
    dtype = next(model.parameters()).dtype
    # Module by module rather than `parameters()`: a tied matrix stands under both of its names.
    targets = dict(model.named_parameters(remove_duplicate=False))
    tied = model.config.tie_embeddings
    pending = set(targets) - ({HEAD} if tied else set()) - set(fresh)
    head: NamedWeight | None = None
    for number, weight in enumerate(source.weights(dtype), 1):
        doing.part("tensor", number, len(targets))
        if tied and weight.name == HEAD:
            head = weight
            continue
        if weight.name not in targets:
            if model.config.mask_token_id is None and is_drafting(weight.name):
                continue  # a model that does not draft
            raise UserError(
                f"{weight.file}: holds tensor {weight.name}, which this architecture "
                f"({model.config.family}) does not have"
            )
        rows = source.config.num_embeddings if weight.name in BY_TOKEN else None
        copy_rows(targets[weight.name], weight, rows, opened)
        pending.discard(weight.name)
    if pending:
        first = min(pending)
        more = f" and {len(pending) - 1} more" if len(pending) > 1 else ""
        raise UserError(f"{source.folder}: tensor {first}{more} missing; the model is incomplete")
    if head is not None:
        check_tied(targets[EMBEDDING], head, opened)


def copy_rows(target: nn.Parameter, weight: NamedWeight, rows: int | None, opened: Opening) -> None:
    """Copy `weight` into `target`; into its first `rows` rows, where a number is given."""
    place = full_shape(target)
    if rows is not None:
        place = torch.Size([rows, *place[1:]])
    if weight.shape != place:
        raise UserError(
            f"{weight.file}: tensor {weight.name} has shape {list(weight.shape)}, "
            f"the config beside it asks for {list(place)}"
        )
    with torch.no_grad(), opened(target) as writes:
        if writes:
            tensor = weight.read()
            if not torch.isfinite(tensor).all():
                raise UserError(
                    f"{weight.file}: tensor {weight.name} holds values that are not finite; the "
                    "model is damaged, get it anew"
                )
            target[: place[0]].copy_(tensor)


def check_tied(embedding: nn.Parameter, head: NamedWeight, opened: Opening) -> None:
    """A file may repeat a tied matrix, but not contradict it."""
    shape, rows = full_shape(embedding), head.shape[0]
    same = head.shape[1:] == shape[1:] and rows <= shape[0]
    with torch.no_grad(), opened(embedding) as writes:
        if same and writes:
            same = torch.equal(embedding[:rows], head.read().to(embedding))
        if not same:
            raise UserError(
                f"{head.file}: tensor {HEAD} differs from {EMBEDDING}, although the config says "
                "they are one; set tie_word_embeddings to false there"
            )
