"""Plain block diffusion decoding of the same weights: what TiDAR is measured against.

A block of K mask tokens behind the text is unmasked over several forwards: each forward draws a
token for every open slot and keeps those whose probability reaches `confidence`, the surest one in
any case. A finished block is read causally, as text was in training, together with the first
forward of the next block. Nothing verifies the tokens: the output is not that of the
autoregressive model, and a slot beside filled ones is something that training with masks alone has
never shown. Sources: block diffusion (Arriola et al., arXiv 2503.09573); confidence-threshold
decoding, Fast-dLLM (Wu et al., arXiv 2505.22618). Letters: N prompt tokens, n pending tokens, K
block size, V vocabulary.
"""

from dataclasses import replace

import torch
from torch import Tensor

from pipeline.decoding.batch import Engine
from pipeline.decoding.sampling import Sampling, Uniforms, draw
from pipeline.decoding.step import StepRule, StepShape
from pipeline.model.transformer import Transformer


class BlockDiffusionEngine(Engine):
    """One row whose blocks are unmasked over several forwards.

    The text's last token is always pending, final but not cached, so a forward is a step of n
    pending tokens and block n: n = K + 1 where a finished block is read, else 1.

    Args:
        model: in evaluation mode, with a mask token.
        sampling: how a slot's token is drawn; its trust is not used.
        shape: the forward that reads a finished block and opens the next (`StepShape.unmasking`).
        capacity: cached tokens, prompt and new ones, without a step's queries.
        confidence: probability, after all settings of `sampling`, from which a token is kept.
        graphs: capture steps as CUDA graphs; only on a GPU.
        prefill_chunk: most prompt tokens in one forward.
    """

    def __init__(
        self,
        model: Transformer,
        sampling: Sampling,
        shape: StepShape,
        *,
        capacity: int,
        confidence: float,
        graphs: bool = False,
        prefill_chunk: int = 512,
    ) -> None:
        assert model.config.mask_token_id is not None, "checked where the method is chosen"
        room = capacity + 3 * shape.block_size + 1
        super().__init__(
            model, sampling, shape,
            batch_size=1, room=room, graphs=graphs, prefill_chunk=prefill_chunk,
        )  # fmt: skip
        self.confidence, self.mask = confidence, model.config.mask_token_id
        size, device = (1, shape.block_size), self.device
        with torch.inference_mode():
            self._pending = torch.zeros(1, shape.tokens, dtype=torch.int64, device=device)
            self._block = torch.full(size, self.mask, dtype=torch.int64, device=device)
            self._open = torch.ones(size, dtype=torch.bool, device=device)
            self._uniforms = torch.zeros(size, dtype=torch.float64, device=device)
            self._places = torch.arange(shape.block_size, device=device)
            self._seen: Tensor | None = None
            if sampling.repetition_penalty != 1:
                tokens = (1, model.config.num_embeddings)
                self._seen = torch.zeros(tokens, dtype=torch.bool, device=device)
            self._rules = {
                step: StepRule(
                    step, self.cache.capacity, device, self.cache.dtype, model.config.causal_slots
                )
                for step in (shape, shape.short)
            }
        self._stream = Uniforms(sampling, 1)
        self._next = shape.short
        self._shown = 0
        """Tokens of the block, from its start, that were given out."""

    @torch.inference_mode()
    def admit(self, row: int, prompt: Tensor, seed: int) -> tuple[list[int], int]:
        """Read a prompt, int64 [N]; the tokens that are final at once, and the forwards it took."""
        self._stream = Uniforms(replace(self.sampling, seed=seed), 1)
        self._pending[0, -1] = prompt[-1]
        if self._seen is not None:
            self._seen.zero_()
            self._seen[0, prompt] = True
        self._open_block()
        hidden, forwards = self._read(row, prompt, self._block)
        self.cache.set_length(row, len(prompt) - 1)
        self._next = self.shape.short
        self._load_uniforms()
        return self._settle(self._unmask(hidden[:, 1:])), forwards

    @torch.inference_mode()
    def step(self) -> list[list[int]]:
        """One forward: the tokens that became final in order, perhaps none."""
        shape = self._next
        self._load_uniforms()
        result = self._run(shape, lambda: self._advance(shape))
        self.cache.set_length(0, self.cache.lengths[0] + shape.tokens - 1)
        self._next = self.shape.short
        return [self._settle(result)]

    def _advance(self, shape: StepShape) -> Tensor:
        """The forward and its draws, on the device; as `_unmask` returns it."""
        rule = self._rules[shape]
        queries = torch.cat([self._pending[:, -shape.tokens :], self._block], dim=1)
        positions = self.cache.positions(rule.offsets)
        bias = self.cache.bias(rule)
        hidden = self.forward.hidden(queries, positions, bias, self.cache, clean=shape.tokens)
        return self._unmask(hidden[:, shape.tokens :])

    def _unmask(self, hidden: Tensor) -> Tensor:
        """Draw for each slot and keep what is sure: int64 [2, K], tokens and slots still open."""
        logits, seen = self.forward.logits(hidden), None
        if self._seen is not None:
            filled = torch.zeros_like(self._seen, dtype=torch.int32)
            filled.scatter_add_(1, self._block, (~self._open).int())
            seen = (self._seen | (filled > 0))[:, None]
        if self.sampling.greedy:
            probabilities = torch.softmax(self.sampling.scores(logits, seen).float(), dim=-1)
            tokens = probabilities.argmax(-1)
        else:
            probabilities = self.sampling.probabilities(logits, seen)
            tokens = draw(probabilities, self._uniforms)
        sure = probabilities.gather(2, tokens[..., None]).squeeze(2).masked_fill(~self._open, -1.0)
        surest = self._places == sure.argmax(-1, keepdim=True)
        kept = self._open & ((sure >= self.confidence) | surest)
        self._block.copy_(torch.where(kept, tokens, self._block))
        self._open.logical_and_(~kept)
        return torch.cat([self._block, self._open.long()])

    def _settle(self, result: Tensor) -> list[int]:
        """The host's account of a forward: tokens up to the first open slot, given out once."""
        tokens, still_open = result.tolist()
        ready = still_open.index(1) if 1 in still_open else len(tokens)
        new, self._shown = tokens[self._shown : ready], ready
        if ready == len(tokens):
            self._pending.copy_(torch.cat([self._pending[:, -1:], self._block], dim=1))
            if self._seen is not None:
                self._seen.scatter_(1, self._block, True)
            self._next = self.shape
            self._open_block()
        return new

    def _open_block(self) -> None:
        self._block.fill_(self.mask)
        self._open.fill_(True)
        self._shown = 0

    def _load_uniforms(self) -> None:
        if not self.sampling.greedy:
            self._uniforms.copy_(self._stream.take(len(self._places))[None], non_blocking=True)
