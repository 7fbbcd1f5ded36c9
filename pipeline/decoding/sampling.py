"""From logits to tokens, with random streams that are independent of each other; and rejection
sampling, which keeps drafts so that the output is distributed as the target says.

Leviathan et al., *Fast Inference from Transformers via Speculative Decoding* (2023), with p the
target (verifier) and q the draft distribution; TiDAR (arXiv 2511.08923), section 3.2. Nothing in
`verify` waits for the device. Letters: B rows of a batch, independent, N drafts, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tidar_common.errors import UserError

CHUNK = 1024
"""Random numbers drawn at once for a stream."""
PIECE = 256
"""Tokens whose weights are summed up together to find the piece that holds a drawn one."""
UNITS = 2.0**52
"""Of which a distribution is made where it must add up exactly: all whole numbers of fp64."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; verifier and drafter use the same settings.

    The logits of tokens that already occurred are divided (positive) or multiplied (negative) by
    `repetition_penalty`, then divided by `temperature`; of what is left, `top_k` keeps the k
    largest (all that tie with the k-th), and `top_p` the smallest set of largest probabilities that
    reaches it. Order and definitions are those of Hugging Face's `generate`.
    `temperature` 0 is greedy. `trust` is the weight β of the autoregressive logits in the
    verifier's target, β · AR + (1 - β) · diffusion: 1 ("trust AR") is lossless, below 1 is not.
    """

    temperature: float = 0.0
    trust: float = 1.0
    seed: int = 0
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(f"temperature: must be 0 (greedy) or above, got {self.temperature}")
        if not 0.0 <= self.trust <= 1.0:
            raise UserError(f"trust: must be in [0, 1], got {self.trust}")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k: must be at least 1, or null for all tokens, got {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top_p: must be above 0 and at most 1, got {self.top_p}")
        if self.repetition_penalty <= 0:
            raise UserError(
                f"repetition_penalty: must be above 0 (1 is none), got {self.repetition_penalty}"
            )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def generator(self, stream: int) -> torch.Generator:
        """A generator for one purpose (0 verifies, 1 drafts), unrelated to the others."""
        state = torch.Generator().manual_seed(self.seed)
        seeds = torch.randint(2**62, (stream + 1,), generator=state)
        return torch.Generator().manual_seed(int(seeds[stream]))

    def scores(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """Logits whose argmax greedy decoding takes: after the penalty for `seen` tokens.

        Args:
            logits: [..., V].
            seen: bool, broadcasting to it; None where there is no penalty.
        """
        if seen is None:
            return logits
        logits = logits.float()
        penalised = torch.where(
            logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty
        )
        return torch.where(seen, penalised, logits)

    def probabilities(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """The distribution that tokens are drawn from, fp32 [..., V]; one-hot when greedy."""
        scores = self.scores(logits, seen)
        if self.greedy:
            best = scores.argmax(-1, keepdim=True)
            return torch.zeros_like(scores, dtype=torch.float32).scatter_(-1, best, 1.0)
        scores = scores.float() / self.temperature
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            least = scores.topk(self.top_k, dim=-1).values[..., -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        probabilities = torch.softmax(scores, dim=-1)
        return self._nucleus(probabilities) if self.top_p < 1 else probabilities

    def _nucleus(self, probabilities: Tensor) -> Tensor:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        # A token stays when those before it fall short of top_p; so the first always stays.
        whole = counts(ordered)
        before = whole.cumsum(-1) - whole
        kept = ordered.masked_fill(before >= int(self.top_p * UNITS), 0.0)
        kept = torch.zeros_like(probabilities).scatter_(-1, order, kept)
        return kept / kept.sum(-1, keepdim=True)


class Uniforms:
    """A stream of random numbers in [0, 1), fp64, that depends on nothing but its seed.

    Drawn on the host in large pieces: so a request's numbers are the same on every device and
    beside any other requests, and the device draws none (a CUDA graph may not).
    """

    def __init__(self, sampling: Sampling, stream: int) -> None:
        self._generator = sampling.generator(stream)
        self._ready = torch.empty(0, dtype=torch.float64)

    def take(self, count: int) -> Tensor:
        """The next `count` numbers, [count] on the CPU."""
        if len(self._ready) < count:
            fresh = torch.rand(max(CHUNK, count), generator=self._generator, dtype=torch.float64)
            self._ready = torch.cat([self._ready, fresh])
        taken, self._ready = self._ready[:count], self._ready[count:]
        return taken


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


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """One token for each row of `weights` [..., V], in proportion; int64 [...].

    The inverse of the cumulative distribution: a number in [0, 1) for each row decides, and a token
    of weight 0 is never drawn. Weights become whole numbers, 2^52 in all, so that sums are exact in
    any order (on a GPU, running sums of floating numbers are not the same twice); and they are
    summed up in pieces, first to find the piece: one long running sum would keep a single
    processor of a GPU busy.

    Args:
        weights: not negative, with a positive sum in every row; it need not be 1.
        uniform: fp64 [...].
    """
    whole = counts(weights)
    missing = -whole.shape[-1] % PIECE
    if missing:
        whole = F.pad(whole, (0, missing))
    pieces = whole.unflatten(-1, (-1, PIECE))
    ends = pieces.sum(-1).cumsum(-1)
    place = (uniform * ends[..., -1]).long()[..., None]
    # Logits that are no numbers must not become places outside of memory.
    piece = torch.searchsorted(ends, place, right=True).clamp_max_(ends.shape[-1] - 1)
    inside = pieces.gather(-2, piece[..., None].expand(*piece.shape, PIECE)).squeeze(-2)
    sums = inside.cumsum(-1)
    # What the pieces before add up to is the end of this one less its own sum.
    place += sums[..., -1:] - ends.gather(-1, piece)
    token = piece * PIECE + torch.searchsorted(sums, place, right=True)
    return token.squeeze(-1).clamp_max_(weights.shape[-1] - 1)


def counts(weights: Tensor) -> Tensor:
    """Weights [..., V] as whole numbers, int64, that add up to 2^52 or little less in each row."""
    scale = UNITS / weights.sum(-1, keepdim=True, dtype=torch.float64)
    return (weights * scale).long()


def verify(
    drafts: Tensor,
    draft_probabilities: Tensor,
    target: Tensor,
    uniform: Tensor,
    limit: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Accept drafts from the left, then draw the token after the last accepted one.

    Draft i is accepted with probability min(1, p_i / q_i); at the first rejection the token comes
    from the normalised positive part of p - q, after the last draft from p itself.

    Args:
        drafts: token ids, int64 [B, N].
        draft_probabilities: q, the distributions the drafts were drawn from, [B, N, V].
        target: p for the same N positions and the one after them, [B, N + 1, V].
        uniform: fp64 [B, N + 1], one number for each decision and one for the drawn token.
        limit: int64 [B], how many of a row's drafts count; None means all N.

    Returns:
        The number of accepted drafts, int64 [B], and the tokens drawn after them, int64 [B].
    """
    count = drafts.shape[1]
    if count == 0:
        return torch.zeros_like(uniform[:, 0], dtype=torch.int64), draw(target[:, 0], uniform[:, 0])
    column = drafts[..., None]
    p = target[:, :count].gather(2, column).squeeze(2)
    q = draft_probabilities.gather(2, column).squeeze(2)
    # u < p / q without the division; a draft has q > 0, or it would not have been drawn.
    good = uniform[:, :count] * q < p
    accepted = _accepted(good, limit)
    corrected = accepted < (count if limit is None else limit)
    p_row = _row(target, accepted)
    q_row = _row(draft_probabilities, accepted.clamp_max(count - 1))
    rest = (p_row - q_row).clamp_min_(0.0)
    # When p and q agree to the last bit, p is all that is left to draw from.
    corrected = corrected & (rest.sum(-1) > 0)
    weights = torch.where(corrected[:, None], rest, p_row)
    return accepted, draw(weights, uniform[:, count])


def verify_greedy(
    drafts: Tensor, best: Tensor, limit: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same for one-hot rows: accept while the draft is the target's argmax.

    Args:
        drafts: int64 [B, N].
        best: the target's argmax at each position, int64 [B, N + 1].
        limit: as in `verify`.
    """
    if drafts.shape[1] == 0:
        return torch.zeros_like(best[:, 0]), best[:, 0]
    accepted = _accepted(drafts == best[:, :-1], limit)
    return accepted, best.gather(1, accepted[:, None]).squeeze(1)


def _accepted(good: Tensor, limit: Tensor | None) -> Tensor:
    """How many of the leading entries of each row of `good` [B, N] are true, at most `limit`."""
    accepted = good.long().cumprod(1).sum(1)
    return accepted if limit is None else torch.minimum(accepted, limit)


def _row(table: Tensor, index: Tensor) -> Tensor:
    """Row `index[b]` of `table[b]`: [B, N, V] and [B] to [B, V]."""
    return table[torch.arange(len(table), device=table.device), index]
