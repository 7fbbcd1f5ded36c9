"""A model that costs nothing, to see what the rest of a decoding step costs."""

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.model.transformer import Transformer

MOST_TOKENS = 512
"""Of one forward: a piece of a prompt, or a step's queries."""


class FreeModel(Transformer):
    """Gives back tensors that were made beforehand, of the shapes that `like` gives; `with_head`
    keeps its draft head, which then is all that costs anything."""

    def __init__(self, like: Transformer, block_size: int, with_head: bool = False) -> None:
        nn.Module.__init__(self)
        config = like.config
        first = next(like.parameters())
        self.config = config
        self._weight = nn.Parameter(torch.zeros((), dtype=first.dtype, device=first.device))
        tokens = max(MOST_TOKENS + block_size, block_size + block_size**2)
        self._hidden = torch.zeros(1, tokens, config.hidden_size).to(first)
        self._logits = torch.zeros(1, 2 * block_size, config.num_embeddings).to(first)
        self.lm_head = self.logits  # type: ignore[assignment]
        self.draft_head = like.draft_head if with_head else None
        self.model = like.model

    def for_decoding(self, positions: int) -> "FreeModel":  # type: ignore[override]
        return self

    def hidden(self, input_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        return self._hidden[:, : input_ids.shape[1]]

    def logits(self, hidden: Tensor) -> Tensor:
        return self._logits[:, : hidden.shape[1]]
