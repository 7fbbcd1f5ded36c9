"""Which step pays: block length and mask blocks from the latency curve and the acceptance.

With a_i the acceptance of draft position i where it is reached, a full step with K tokens in hand
makes E = 1 + a_1 + a_1 a_2 + … tokens, and accepts exactly j of them with probability
P_j = a_1 … a_{j-1} (1 - a_j), or a_1 … a_{K-1} for j = K. With the blocks J in the step, a short
step of one token follows with probability 1 - P(J). So

    tokens per second = (E + 1 - P(J)) / (T_full(J) + (1 - P(J)) · T_short)

to be compared with 1 / T of a single token. The output is the same whatever is chosen. A batch of B
rows is taken for one row with B times the queries. A step of linear drafts has a draft behind any
count, so P(J) = 1; its acceptance is measured on stale slots as they come.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.decoding.latency import LatencyCurve
from pipeline.decoding.step import StepShape

MARGIN = 1.05
"""By how much drafting must win: the curve knows forwards, and drafting has a host's part too."""


@dataclass(frozen=True)
class Choice:
    """A step and what it promises."""

    shape: StepShape
    """One token and no block where drafting does not pay."""
    tokens_per_second: float
    tokens_per_forward: float

    @property
    def method(self) -> str:
        return "tidar" if self.shape.drafting else "ar"

    def __str__(self) -> str:
        rate = f"{self.tokens_per_second:.1f} tokens/s expected"
        if not self.shape.drafting:
            return f"plain steps ({rate}): drafting does not pay here"
        numbers = ", ".join(map(str, self.shape.blocks)) or "in every second step only"
        blocks = "one block for all counts" if self.shape.linear else f"blocks {numbers}"
        return (
            f"K = {self.shape.block_size}, {blocks}, {self.shape.num_queries} queries "
            f"({self.tokens_per_forward:.2f} tokens per forward, {rate})"
        )


def accepted_probabilities(acceptance: Sequence[float]) -> list[float]:
    """P_1 … P_K for acceptances a_1 … a_{K-1}; their sum is 1."""
    probabilities, reached = [], 1.0
    for rate in acceptance:
        probabilities.append(reached * (1.0 - rate))
        reached *= rate
    return [*probabilities, reached]


def expected(
    shape: StepShape,
    acceptance: Sequence[float],
    curve: LatencyCurve,
    cached: int,
    batch_size: int = 1,
) -> Choice:
    """The `Choice` of a drafting step; `acceptance` has one entry for each draft at least."""
    size = shape.block_size
    probabilities = accepted_probabilities(acceptance[: size - 1])
    tokens = sum(count * chance for count, chance in enumerate(probabilities, 1))
    there = sum(p for count, p in enumerate(probabilities, 1) if shape.has_block(count))
    missing = max(0.0, 1.0 - there)
    rows = 2 * size - 1 if shape.blocks else size
    full = curve.step_seconds(batch_size * shape.num_queries, batch_size * rows, cached)
    short = curve.step_seconds(batch_size * shape.short.num_queries, batch_size * size, cached)
    made, forwards = tokens + missing, 1.0 + missing
    return Choice(shape, batch_size * made / (full + missing * short), made / forwards)


def choose(
    acceptance: Sequence[float],
    curve: LatencyCurve,
    cached: int,
    *,
    batch_size: int = 1,
    drafting: bool = False,
    linear: bool = False,
) -> Choice:
    """The fastest step at about `cached` tokens, by expectation.

    Args:
        acceptance: a_1 … a_{K-1} of the largest K to consider, each in [0, 1].
        curve: of the model and device.
        cached: tokens in the cache, for instance half of what a generation ends with.
        batch_size: rows side by side.
        drafting: leave out plain steps and any K but the largest, so that the acceptance of every
            position can be seen.
        linear: of a model of linear drafts.
    """
    best = max(
        (
            expected(shape, acceptance, curve, cached, batch_size)
            for shape in shapes(acceptance, batch_size, linear)
            if not drafting or shape.block_size == len(acceptance) + 1
        ),
        key=lambda option: option.tokens_per_second,
        default=None,
    )
    plain = batch_size / curve.step_seconds(batch_size, batch_size, cached)
    if best is not None and (drafting or best.tokens_per_second > MARGIN * plain):
        return best
    return Choice(StepShape(1), plain, 1.0)


def shapes(
    acceptance: Sequence[float], batch_size: int = 1, linear: bool = False
) -> Iterator[StepShape]:
    """For each K from 2: no block, then more blocks, the likeliest first, up to all; of linear
    drafts the one block.

    In a batch block 1 is always there: a row without a draft waits for it while others have one.
    """
    if linear:
        yield from map(StepShape.one_block, range(2, len(acceptance) + 2))
        return
    least = 0 if batch_size == 1 else 1
    for size in range(2, len(acceptance) + 2):
        probabilities = accepted_probabilities(acceptance[: size - 1])
        order = sorted(range(1 + least, size + 1), key=lambda block: -probabilities[block - 1])
        for count in range(size + 1 - least):
            yield StepShape(size, size, tuple(sorted([*range(1, 1 + least), *order[:count]])))
