"""TiDAR decoding: every forward verifies the current draft and writes the next one."""

from collections.abc import Iterator

import torch
from torch import Tensor

from pipeline.decoding.cache import KVCache
from pipeline.decoding.sampling import Sampling, draw
from pipeline.decoding.step import (
    block_rows,
    num_queries,
    prefill_mask,
    step_mask,
    step_positions,
)
from pipeline.decoding.verify import verify
from pipeline.model.transformer import Transformer


def decode_tidar(
    model: Transformer,
    prompt: Tensor,
    cache: KVCache,
    sampling: Sampling,
    *,
    block_size: int,
    mask_token_id: int,
) -> Iterator[list[int]]:
    """Yield the tokens that each forward makes final: 1 for the first, then 1 … K each.

    Args:
        model: in evaluation mode.
        prompt: token ids, int64 [N], N >= 1.
        cache: empty, with room for all tokens and one step's K + K² queries.
        sampling: temperature, trust and seed.
        block_size: K.
        mask_token_id: the token that stands in mask slots.
    """
    drafter = Drafter(model, sampling, prompt.device)
    verifier_stream = sampling.generator(0, prompt.device)
    slots = torch.full((block_size,), mask_token_id, device=prompt.device)
    positions = step_positions(block_size, prompt.device)
    mask = step_mask(block_size, cache.capacity, prompt.device)

    # First forward: the prompt, and one block that drafts what follows it.
    queries = torch.cat([prompt, slots])[None]
    first_mask = prefill_mask(len(prompt), block_size, prompt.device)
    hidden = model.hidden(queries, mask=first_mask, cache=cache)[0]
    cache.keep(len(prompt))
    ar_logits = model.lm_head(hidden[len(prompt) - 1 : len(prompt)])
    # `current` is d_0, final but not yet cached; `drafter` holds d_1 … d_{K-1}.
    drafter.draft(hidden[len(prompt) :])
    target = drafter.target(ar_logits, drafter.head_logits)
    current = int(draw(target, verifier_stream))
    yield [current]

    blocks = slots.repeat(block_size)
    while True:
        drafts = drafter.tokens
        head = torch.tensor([current], device=prompt.device)
        queries = torch.cat([head, drafts, blocks])[None]
        visible = mask[:, cache.capacity - cache.length :]
        hidden = model.hidden(queries, positions + cache.length, visible, cache)[0]
        ar_logits = model.lm_head(hidden[:block_size])
        target = drafter.target(ar_logits, drafter.following_logits(hidden, block_size))
        matched, current = verify(drafts, drafter.probabilities, target, verifier_stream)
        accepted = matched + 1  # d_0 was final before the step
        cache.keep(accepted)
        drafter.draft(hidden[block_rows(block_size, accepted)])
        yield [*drafts[:matched].tolist(), current]


class Drafter:
    """The draft in hand: tokens d_1 … d_{K-1} and the distributions they were drawn from."""

    def __init__(self, model: Transformer, sampling: Sampling, device: torch.device) -> None:
        self.lm_head = model.lm_head
        self.sampling = sampling
        self.stream = sampling.generator(1, device)
        self.tokens: Tensor
        """int64 [K - 1]"""
        self.probabilities: Tensor
        """q, fp32 [K - 1, V]"""
        self.logits: Tensor
        self.head_logits: Tensor
        """Diffusion logits of the block's first position, [1, V]; [0, V] at trust 1."""

    def draft(self, block: Tensor) -> None:
        """Draw d_1 … d_{K-1} from the hidden states of a mask block, [K, E].

        The block's first slot stands where the verifier's own token goes: nothing is drawn there.
        """
        self.head_logits = self.lm_head(block[:1]) if self.sampling.trust < 1 else block[:0]
        self.logits = self.lm_head(block[1:])
        self.probabilities = self.sampling.probabilities(self.logits)
        if self.sampling.temperature == 0:
            self.tokens = self.logits.argmax(-1)
        else:
            self.tokens = draw(self.probabilities, self.stream)

    def following_logits(self, hidden: Tensor, block_size: int) -> Tensor:
        """Diffusion logits for positions P + 1 … P + K, where trust below 1 mixes them in, [K, V].

        The drafts' own logits, then those of the first slot of block K (all drafts accepted).
        """
        if self.sampling.trust == 1:
            return self.logits[:0]
        last = hidden[block_rows(block_size, block_size)][:1]
        return torch.cat([self.logits, self.lm_head(last)])

    def target(self, ar_logits: Tensor, diffusion_logits: Tensor) -> Tensor:
        """The distributions that the output follows, from AR logits [N, V]; fp32 [N, V]."""
        trust = self.sampling.trust
        if trust < 1:
            ar_logits = trust * ar_logits.float() + (1 - trust) * diffusion_logits.float()
        return self.sampling.probabilities(ar_logits)


def room_needed(prompt_length: int, max_new_tokens: int, block_size: int) -> int:
    """Cache capacity, in tokens, for a whole generation."""
    # The last step may start one token before the end.
    return prompt_length + max(max_new_tokens, 1) + num_queries(block_size)
