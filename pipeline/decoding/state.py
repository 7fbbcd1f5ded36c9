"""What the rows of a batch carry from one decoding step to the next, in tensors that stay.

Everything is written in place, so that a captured step finds its inputs where it left them.
Letters: B rows, n tokens in hand, K block size, V vocabulary.
"""

import torch
from torch import Tensor

from pipeline.decoding.drafting import Draft
from pipeline.decoding.sampling import Sampling, Uniforms
from pipeline.decoding.step import StepShape


class RowState:
    """The tokens in hand of each row, and what verifying them needs."""

    def __init__(
        self,
        shape: StepShape,
        sampling: Sampling,
        vocabulary: int,
        batch_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        behind = shape.drafts - 1
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
            numbers = shape.drafts + max(shape.block_size - 1, 0)
            self.uniforms = torch.zeros(batch_size, numbers, dtype=torch.float64, device=device)
        if sampling.trust < 1:
            self.logits = torch.zeros(batch_size, behind, vocabulary, dtype=dtype, device=device)
        if sampling.repetition_penalty != 1:
            self.seen = torch.zeros(batch_size, vocabulary, dtype=torch.bool, device=device)

    def set_draft(self, rows: slice, draft: Draft) -> None:
        """Put a draft in the hands of `rows`."""
        self.drafts[rows] = draft.tokens
        if self.probabilities is not None:
            assert draft.probabilities is not None, "drafts that are drawn have a distribution"
            self.probabilities[rows] = draft.probabilities
        if self.logits is not None:
            assert draft.logits is not None, "kept where trust is below 1"
            self.logits[rows] = draft.logits


class RowStreams:
    """Random streams of a batch's rows: each row has two of its own, from its request's seed."""

    def __init__(self, batch_size: int) -> None:
        self._verify: list[Uniforms | None] = [None] * batch_size
        self._draft: list[Uniforms | None] = [None] * batch_size

    def start(self, row: int, sampling: Sampling) -> None:
        """Begin the streams of a new request in `row`."""
        self._verify[row] = Uniforms(sampling, 0)
        self._draft[row] = Uniforms(sampling, 1)

    def take(self, row: int, verify: int, draft: int) -> Tensor:
        """The row's next numbers, fp64 [verify + draft]; zeros for a row that never started."""
        verifier, drafter = self._verify[row], self._draft[row]
        if verifier is None or drafter is None:
            return torch.zeros(verify + draft, dtype=torch.float64)
        return torch.cat([verifier.take(verify), drafter.take(draft)])
