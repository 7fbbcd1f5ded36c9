"""One decoding step of a batch, for every method: forward, verify, and draft what comes next.

TiDAR, plain autoregression, and verification of drafts from elsewhere differ in the shape of the
step alone (`pipeline.decoding.step`), so they share cache, kernels and code. Nothing inside a step
waits for the device; the one wait is for the tokens it made. Letters: B rows, n tokens in hand, K
block size, Q queries of a step, E hidden size, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.decoding.batch import Engine
from pipeline.decoding.drafting import Behind, Draft, Drafter
from pipeline.decoding.proposals import Proposer
from pipeline.decoding.sampling import RowStreams, Sampling, draw, verify, verify_greedy
from pipeline.decoding.step import StepRule, StepShape
from pipeline.model.transformer import Transformer


class StepEngine(Engine):
    """Rows whose tokens a verifier makes final; idle rows change nothing.

    Args:
        model: in evaluation mode; with a mask token where the shape has blocks.
        sampling: how tokens are drawn; each row has its own seed.
        shape: a row's step while it has a draft.
        batch_size: rows.
        capacity: cached tokens of the longest row, prompt and new ones, without a step's queries.
        graphs: capture steps as CUDA graphs; only on a GPU.
        prefill_chunk: most prompt tokens in one forward.
        proposer: where drafts come from, for one row whose shape has no blocks.
    """

    def __init__(
        self,
        model: Transformer,
        sampling: Sampling,
        shape: StepShape,
        *,
        batch_size: int = 1,
        capacity: int,
        graphs: bool = False,
        prefill_chunk: int = 512,
        proposer: Proposer | None = None,
    ) -> None:
        assert proposer is None or (batch_size == 1 and not shape.drafting), "one plain row only"
        spare = 0 if proposer is None else proposer.count
        super().__init__(
            model,
            sampling,
            replace(shape, sequential=shape.drafting and model.draft_head is not None),
            batch_size=batch_size,
            room=capacity + shape.num_queries + shape.block_size + spare,
            # Drafts from elsewhere differ in number from step to step.
            graphs=graphs and proposer is None,
            prefill_chunk=prefill_chunk,
        )
        self.proposer = proposer
        with torch.inference_mode():
            self.drafter = Drafter(model, self.forward.logits, sampling)
            self.state = RowState(
                self.shape, sampling, model.config.num_embeddings, batch_size,
                self.cache.dtype, self.device,
            )  # fmt: skip
        self.streams = RowStreams(batch_size)
        self.with_block = [False] * batch_size
        """Whether each row's draft in hand was made with its mask block."""
        self._drafted = [False] * batch_size
        self._active = [False] * batch_size
        self._tables: dict[StepShape, _Tables] = {}

    @property
    def _drafts_itself(self) -> bool:
        return self.shape.drafting

    @torch.inference_mode()
    def reshape(self, shape: StepShape) -> None:
        """Go on with another step; rows keep their text and lose the draft in hand.

        Args:
            shape: at most as large as the one the engine was made with: the cache has room for it.
        """
        assert self.proposer is None, "drafts from elsewhere have no shape to change"
        headed = self.model.draft_head is not None
        self.shape = replace(shape, sequential=shape.drafting and headed)
        self.state.limit.zero_()
        self._drafted = [False] * self.batch_size

    # --- a new request ---

    @torch.inference_mode()
    def admit(self, row: int, prompt: Tensor, seed: int) -> tuple[list[int], int]:
        """Read a prompt, int64 [N], into `row`; its first new token, and the forwards it took.

        The prompt goes through the model in chunks; with the last one goes the block that drafts
        what follows the first token.
        """
        state = self.state
        self.streams.start(row, replace(self.sampling, seed=seed))
        if self.proposer is not None:
            self.proposer.start(seed)
        slots = self._mask_slots(1, self.shape.prefill_slots)
        hidden, forwards = self._read(row, prompt, slots)
        if state.seen is not None:
            state.seen[row] = False
            state.seen[row, prompt] = True
        uniforms = self._uniforms([row], 1) if not self.sampling.greedy else None
        token = self._begin(slice(row, row + 1), hidden[:, :1], hidden[:, 1:], uniforms)
        self._start_row(row, len(prompt))
        return [int(token)], forwards

    def _begin(self, rows: slice, hidden: Tensor, block: Tensor, uniforms: Tensor | None) -> Tensor:
        """First tokens [b] and drafts of `rows`, from their prompts' last hidden states [b, 1, E]
        and those of the blocks behind them [b, slots, E], or [b, 0, E] where there are none."""
        token = self._first_token(hidden, block, rows, uniforms)
        self.state.current[rows] = token[:, None]
        first = block[:, : self.shape.block_size]  # of a linear block, nothing is accepted yet
        rest = None if uniforms is None else uniforms[:, 1:]
        self._draft_rows(rows, hidden[:, 0], first if block.shape[1] else None, None, rest)
        return token

    def _first_token(
        self, hidden: Tensor, block: Tensor, rows: slice, uniforms: Tensor | None
    ) -> Tensor:
        """The token after each prompt, [b]; `hidden` is that of its last token, [b, 1, E]."""
        logits = self.forward.logits(hidden)
        if self.sampling.trust < 1:
            logits = self._mix(logits, self.forward.logits(block[:, :1]))
        seen = None if self.state.seen is None else self.state.seen[rows][:, None]
        if uniforms is None:
            return self.sampling.scores(logits, seen).argmax(-1)[:, 0]
        return draw(self.sampling.probabilities(logits, seen)[:, 0], uniforms[:, 0])

    def _start_row(self, row: int, length: int) -> None:
        self._active[row] = True
        self.state.active[row] = 1
        self._drafted[row] = self._drafts_itself
        self.with_block[row] = self.shape.prefill_slots > 0
        self.state.limit[row] = self.shape.tokens - 1 if self._drafts_itself else 0
        self.rewind(row, length)

    def release(self, row: int) -> None:
        """The row's request is done: it stays idle until the next is admitted."""
        self._active[row] = False
        self._drafted[row] = False
        with torch.inference_mode():
            self.state.active[row] = 0

    @torch.inference_mode()
    def rewind(self, row: int, length: int, *, drafted: bool | None = None) -> None:
        """Forget all but the first `length` cached tokens of `row`; the draft in hand stays.

        `drafted` says that the row has a draft, or none, whatever the last step left it.
        """
        self.cache.set_length(row, length)
        if drafted is not None:
            self._drafted[row] = drafted
            self.state.limit[row] = self.shape.tokens - 1 if drafted else 0

    @torch.inference_mode()
    def propose(self, text: Sequence[int]) -> None:
        """Let the proposer draft what follows `text`, prompt included; nothing without one."""
        if self.proposer is None:
            return
        tokens, probabilities = self.proposer.propose(text)
        count, state = len(tokens), self.state
        self._drafted[0] = count > 0
        if count == 0:
            return
        self.shape = StepShape(count + 1)
        state.drafts = torch.tensor([tokens], device=self.device)
        if not self.sampling.greedy:
            if probabilities is None:  # not drawn: q is 1 at each token
                rows = torch.zeros(count, self.model.config.num_embeddings, device=self.device)
                probabilities = rows.scatter_(1, state.drafts[0][:, None], 1.0)
            state.probabilities = probabilities[None]
            state.uniforms = torch.zeros(1, count + 1, dtype=torch.float64, device=self.device)

    # --- a step ---

    @torch.inference_mode()
    def step(self) -> list[list[int]]:
        """One forward: the tokens that became final in each row; idle rows give none."""
        shape = self.shape if any(self._drafted) else self.shape.short
        self.verified = [shape.tokens - 1 if drafted else 0 for drafted in self._drafted]
        self._load_uniforms()
        result = self._run(shape, lambda: self._advance(shape, self._table(shape)))
        return [self._settle(row, shape, values) for row, values in enumerate(result.tolist())]

    def _settle(self, row: int, shape: StepShape, values: list[int]) -> list[int]:
        """The host's account of a row after a step; `values` are accepted, drafts, token."""
        if not self._active[row]:
            return []
        accepted = values[0]
        self.cache.lengths[row] += accepted + 1
        self._drafted[row] = shape.drafted_after(accepted + 1)
        self.with_block[row] = shape.has_block(accepted + 1)
        return [*values[1 : 1 + accepted], values[-1]]

    def _advance(self, shape: StepShape, table: "_Tables") -> Tensor:
        """The step itself, on the device: int64 [B, 1 + n], accepted | d_1 … d_{n-1} | token."""
        state, count = self.state, shape.tokens - 1
        drafts = state.drafts[:, :count]
        queries = torch.cat([state.current, drafts, table.slots], dim=1)
        positions = self.cache.positions(table.rule.offsets)
        bias = self.cache.bias(table.rule)
        hidden = self.forward.hidden(queries, positions, bias, self.cache, clean=shape.tokens)
        logits = self.forward.logits(hidden if table.head_once else hidden[:, : shape.tokens])
        tokens = torch.cat([state.current, drafts], dim=1)
        seen = self._seen(tokens)
        accepted, token = self._verify(shape, logits, hidden, drafts, seen)
        result = torch.cat([accepted[:, None], drafts, token[:, None]], dim=1)
        self.cache.advance(accepted, state.active)
        state.current.copy_(token[:, None])
        if seen is not None and state.seen is not None:
            state.seen.copy_(seen[table.rows, accepted])
        if shape.drafting:
            self._draft_after(shape, table, hidden, logits, accepted)
        return result

    def _draft_after(
        self, shape: StepShape, table: "_Tables", hidden: Tensor, logits: Tensor, accepted: Tensor
    ) -> None:
        """Draft what follows a step's own token, in every row that can be drafted."""
        state, block, there, known = self.state, None, None, None
        if table.starts is not None:
            start = table.starts[accepted + 1]
            there = start >= 0
            index = start.clamp_min(0)[:, None] + table.block
            block = hidden[table.rows[:, None], index]
            if table.head_once:
                known = logits[table.rows[:, None], index[:, 1:]]
        if shape.sequential:
            state.limit.fill_(shape.block_size - 1)
        elif there is not None:
            state.limit.copy_(torch.where(there, shape.block_size - 1, 0))
        else:
            state.limit.zero_()
            return
        uniforms, first = None, self.shape.tokens
        if state.uniforms is not None:
            uniforms = state.uniforms[:, first : first + shape.block_size - 1]
        row = hidden[table.rows, accepted]
        self._draft_rows(slice(None), row, block, there, uniforms, known)

    def _verify(
        self,
        shape: StepShape,
        logits: Tensor,
        hidden: Tensor,
        drafts: Tensor,
        seen: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Accepted drafts and the token after them, [B] each; `logits` are those of the tokens in
        hand, and perhaps of more."""
        state, count = self.state, shape.tokens - 1
        logits = logits[:, : shape.tokens]
        if self.sampling.trust < 1:
            assert state.logits is not None, "kept where trust is below 1"
            behind = hidden[:, shape.block_rows(shape.tokens)][:, :1]
            drafted = torch.cat([state.logits[:, :count], self.forward.logits(behind)], dim=1)
            logits = self._mix(logits, drafted)
        limit = state.limit if self.batch_size > 1 and count else None
        if self.sampling.greedy:
            best = self.sampling.scores(logits, seen).argmax(-1)
            return verify_greedy(drafts, best, limit)
        assert state.probabilities is not None, "kept where tokens are drawn"
        assert state.uniforms is not None, "kept where tokens are drawn"
        target = self.sampling.probabilities(logits, seen)
        # The last number of the verifier's draws the token, in a short step too: so a row's use of
        # its streams does not depend on whether its neighbours have drafts.
        full = self.shape.tokens
        uniforms = state.uniforms[:, full - shape.tokens : full]
        return verify(drafts, state.probabilities[:, :count], target, uniforms, limit)

    def _draft_rows(
        self,
        rows: slice,
        hidden: Tensor,
        block: Tensor | None,
        there: Tensor | None,
        uniforms: Tensor | None,
        logits: Tensor | None = None,
    ) -> None:
        """Draw d_1 … d_{K-1} of `rows`; what they are made of is as in `Behind`."""
        size = self.shape.block_size
        if size < 2:
            return
        current, seen = self.state.current[rows], self.state.seen
        if seen is not None:
            seen = seen[rows].scatter(1, current, True)
        behind = Behind(hidden, block, there, current, seen, uniforms, logits)
        self.state.set_draft(rows, self.drafter.draw(size, behind))

    def _seen(self, tokens: Tensor) -> Tensor | None:
        """For each of the step's `tokens` [B, n], those before it and itself: bool [B, n, V]."""
        if self.state.seen is None:
            return None
        counts = torch.zeros(
            *tokens.shape, self.state.seen.shape[-1], dtype=torch.int32, device=self.device
        )
        counts.scatter_(2, tokens[..., None], 1)
        return self.state.seen[:, None] | (counts.cumsum(1) > 0)

    def _mix(self, ar_logits: Tensor, diffusion_logits: Tensor) -> Tensor:
        trust = self.sampling.trust
        return trust * ar_logits.float() + (1 - trust) * diffusion_logits.float()

    # --- what a step needs from the host ---

    def _load_uniforms(self) -> None:
        if self.state.uniforms is not None:
            numbers = self._uniforms(range(self.batch_size), self.shape.tokens)
            self.state.uniforms[:, : numbers.shape[1]].copy_(numbers, non_blocking=True)

    def _uniforms(self, rows: Sequence[int], verify_count: int) -> Tensor:
        """Random numbers of `rows`: those of the verifier, then K - 1 of the drafter."""
        draft_count = max(self.shape.block_size - 1, 0) if self._drafts_itself else 0
        taken = [self.streams.take(row, verify_count, draft_count) for row in rows]
        return torch.stack(taken).to(self.device, non_blocking=True)

    def _mask_slots(self, batch_size: int, count: int) -> Tensor:
        mask = self.model.config.mask_token_id
        assert mask is not None or count == 0, "a model that drafts has a mask token"
        return torch.full((batch_size, count), mask or 0, dtype=torch.int64, device=self.device)

    def _table(self, shape: StepShape) -> "_Tables":
        if shape not in self._tables:
            slots = self._mask_slots(self.batch_size, shape.num_queries - shape.tokens)
            causal, cache = self.model.config.causal_slots, self.cache
            rule = StepRule(shape, cache.capacity, self.device, cache.dtype, causal)
            self._tables[shape] = _Tables(rule, slots, self._head_once(shape))
        return self._tables[shape]

    def _head_once(self, shape: StepShape) -> bool:
        """Whether logits of all queries, of which most are not used, cost less than a second
        reading of the LM head for the chosen block.

        On a GPU a row costs the writing and reading of its fp32 logits, 8 bytes a token, and the
        head is read once instead of twice, E weights a token. On a CPU a row costs its product.
        """
        if self.device.type != "cuda" or self.model.draft_head is not None or not shape.blocks:
            return False
        unused = self.batch_size * (shape.num_queries - shape.tokens - shape.block_size)
        row_bytes = self.model.config.hidden_size * self.cache.dtype.itemsize
        return unused * 8 < row_bytes / 2


class _Tables:
    """What a shape's steps have in common, built once."""

    def __init__(self, rule: StepRule, slots: Tensor, head_once: bool) -> None:
        shape, device = rule.shape, slots.device
        self.slots = slots
        """Mask tokens, [B, Q - n]."""
        self.rule = rule
        self.head_once = head_once
        """Whether the LM head is applied to all queries before the block is chosen."""
        self.rows = torch.arange(len(slots), device=device)
        self.block = torch.arange(shape.block_size, device=device)
        self.starts: Tensor | None = None
        """First row of the block for each number of accepted tokens, [n + 1]; -1 for none."""
        if shape.blocks:
            self.starts = torch.tensor(shape.block_starts(), device=device)


class RowState:
    """The tokens in hand of each row, and what verifying them needs, with room for the largest
    step: captured steps go on reading the same memory when the step changes."""

    def __init__(
        self,
        shape: StepShape,
        sampling: Sampling,
        vocabulary: int,
        batch_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        behind = shape.tokens - 1
        self.current = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)
        """d_0, final but not yet cached, [B, 1]."""
        self.drafts = torch.zeros(batch_size, behind, dtype=torch.int64, device=device)
        """d_1 … d_{n-1}, [B, n - 1]."""
        self.limit = torch.zeros(batch_size, dtype=torch.int64, device=device)
        """How many of them count: n - 1, or 0 for a row without a draft, [B]."""
        self.active = torch.zeros(batch_size, dtype=torch.int64, device=device)
        """1 for rows that are decoding, 0 for idle ones, [B]."""
        self.probabilities: Tensor | None = None
        """q, what the drafts were drawn from, fp32 [B, n - 1, V]; None when greedy."""
        self.logits: Tensor | None = None
        """Diffusion logits of the drafts, [B, n - 1, V]; only where trust is below 1."""
        self.seen: Tensor | None = None
        """Tokens of each row so far, d_0 left out, bool [B, V]; only for a repetition penalty."""
        self.uniforms: Tensor | None = None
        """Random numbers of a step: n for the verifier, then K - 1 for the drafter; fp64."""
        if not sampling.greedy:
            self.probabilities = torch.zeros(batch_size, behind, vocabulary, device=device)
            numbers = shape.tokens + max(shape.block_size - 1, 0)
            self.uniforms = torch.zeros(batch_size, numbers, dtype=torch.float64, device=device)
        if sampling.trust < 1:
            self.logits = torch.zeros(batch_size, behind, vocabulary, dtype=dtype, device=device)
        if sampling.repetition_penalty != 1:
            self.seen = torch.zeros(batch_size, vocabulary, dtype=torch.bool, device=device)

    def set_draft(self, rows: slice, draft: Draft) -> None:
        """Put a draft in the hands of `rows`."""
        count = draft.tokens.shape[1]
        self.drafts[rows, :count] = draft.tokens
        if self.probabilities is not None:
            assert draft.probabilities is not None, "drafts that are drawn have a distribution"
            self.probabilities[rows, :count] = draft.probabilities
        if self.logits is not None:
            assert draft.logits is not None, "kept where trust is below 1"
            self.logits[rows, :count] = draft.logits
