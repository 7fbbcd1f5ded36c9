"""Which step pays, block length and mask blocks, and an engine that finds out while decoding.

Where the model comes with the acceptance that its last eval measured, the first step is the one
that pays most by it and by the machine's latency curve. Otherwise, and where plain steps would be
taken, the first steps are trials: they draft with all K positions and the blocks that pay at a
middling acceptance; a draft head then drafts as many without any block. Behind them the acceptance
by position is known well enough to choose, plain steps where drafting does not pay. While an engine
drafts, the choice is looked at again from time to time. Nothing decoded on trial is lost.

With a_i the acceptance of draft position i where it is reached, a full step with K tokens in hand
makes E = 1 + a_1 + a_1 a_2 + … tokens, and accepts exactly j of them with probability
P_j = a_1 … a_{j-1} (1 - a_j), or a_1 … a_{K-1} for j = K. With the blocks J in the step, a short
step of one token follows with probability 1 - P(J). So

    tokens per second = (E + 1 - P(J)) / (T_full(J) + (1 - P(J)) · T_short)

to be compared with 1 / T of a single token. With a draft head no short step follows: what has no
block is drafted without, and accepted with other chances b_i, of which E' and P' are made. A share
pi = P'(J) / (1 - P(J) + P'(J)) of the drafts then comes from blocks, and

    tokens per second = (pi · E + (1 - pi) · E') / T_full(J)

A step of linear drafts has slots for any count, so P(J) = 1; its acceptance is measured on stale
slots as they come. The output is the same whatever is chosen. A batch of B rows is taken for one
row with B times the queries and drafts.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.decoding.engine import StepEngine
from pipeline.decoding.latency import LatencyCurve
from pipeline.decoding.sampling import Sampling
from pipeline.decoding.step import StepShape
from pipeline.model.draft_record import Acceptance
from pipeline.model.transformer import Transformer

MARGIN = 1.05
"""By how much drafting must win: acceptance is known from a few steps only."""
TRIAL_STEPS = 16
"""Steps with a draft, of all rows together, in each trial."""
REVIEW_STEPS = 64
"""Steps with a draft between one look at the choice and the next."""
BETTER = 1.05
"""By how much another step must promise to be better for a change: each loses a draft."""
PRIOR, PRIOR_STEPS = 0.7, 2
"""The acceptance assumed at every position, and the number of steps that it counts for."""
MEASURED_STEPS = 32
"""For how many steps counts what was measured on held-out text: this text may be another kind."""


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
        none = "none" if self.shape.sequential else "in every second step only"
        blocks = f"blocks {', '.join(map(str, self.shape.blocks)) or none}"
        if self.shape.linear and self.shape.blocks:
            blocks = "one block for all counts"
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


@dataclass(frozen=True)
class Conditions:
    """Under which a step is chosen."""

    curve: LatencyCurve
    """Of the model and device."""
    cached: int
    """Tokens in the cache, for instance half of what a generation ends with."""
    batch_size: int = 1
    """Rows side by side."""
    greedy: bool = True
    linear: bool = False
    """Whether the model drafts linearly."""

    def seconds(self, shape: StepShape) -> float:
        """Of a step of all rows."""
        rows = self.batch_size
        return self.curve.step_seconds(
            rows * shape.num_queries, rows * shape.tokens, self.cached, self.greedy
        )


def expected(shape: StepShape, acceptance: Acceptance, conditions: Conditions) -> Choice:
    """The `Choice` of a drafting step."""
    size, rows = shape.block_size, conditions.batch_size
    tokens, present = _outcome(shape, acceptance.block[: size - 1])
    seconds = conditions.seconds(shape)
    if shape.sequential:
        assert acceptance.alone is not None, "a model with a head has both"
        without, appears = _outcome(shape, acceptance.alone[: size - 1])
        share = appears / (1 - present + appears) if appears else 0.0
        tokens = share * tokens + (1 - share) * without
        return Choice(shape, rows * tokens / seconds, tokens)
    missing = 1.0 - present
    tokens, forwards = tokens + missing, 1.0 + missing
    seconds += missing * conditions.seconds(shape.short)
    return Choice(shape, rows * tokens / seconds, tokens / forwards)


def _outcome(shape: StepShape, acceptance: Sequence[float]) -> tuple[float, float]:
    """Expected tokens of a step whose drafts are accepted so, and the chance that the block it then
    needs is there."""
    probabilities = accepted_probabilities(acceptance)
    tokens = sum(count * chance for count, chance in enumerate(probabilities, 1))
    there = sum(p for count, p in enumerate(probabilities, 1) if shape.has_block(count))
    return tokens, min(1.0, there)


def choose(acceptance: Acceptance, conditions: Conditions, *, drafting: bool = False) -> Choice:
    """The fastest step, by expectation.

    `drafting` leaves out plain steps, any K but the largest, and a draft head without any block:
    so the acceptance of every position with its block can be seen.
    """
    best = max(
        (
            expected(shape, acceptance, conditions)
            for shape in shapes(acceptance, conditions.batch_size, conditions.linear)
            if not drafting
            or (shape.block_size == acceptance.largest and (shape.blocks or not shape.sequential))
        ),
        key=lambda option: option.tokens_per_second,
        default=None,
    )
    plain = conditions.batch_size / conditions.seconds(StepShape(1))
    if best is not None and (drafting or best.tokens_per_second > MARGIN * plain):
        return best
    return Choice(StepShape(1), plain, 1.0)


def shapes(
    acceptance: Acceptance, batch_size: int = 1, linear: bool = False
) -> Iterator[StepShape]:
    """For each K from 2: no block, then more blocks, the likeliest first, up to all; of linear
    drafts the one block.

    Without a head block 1 is always there in a batch: a row without a draft waits for it while
    others have one.
    """
    sequential = acceptance.alone is not None
    least = 0 if batch_size == 1 or sequential else 1
    for size in range(2, acceptance.largest + 1):
        if linear:
            yield from (StepShape(size, size, (), sequential), StepShape.one_block(size))
            continue
        probabilities = accepted_probabilities(acceptance.block[: size - 1])
        order = sorted(range(1 + least, size + 1), key=lambda block: -probabilities[block - 1])
        for count in range(size + 1 - least):
            blocks = sorted([*range(1, 1 + least), *order[:count]])
            yield StepShape(size, size, tuple(blocks), sequential)


class ChoosingEngine(StepEngine):
    """A `StepEngine` that chooses its own step; greedy text does not depend on the choice.

    Text that is drawn keeps its distribution, but the draw itself depends on the step: the same
    seed gives another text where another step is chosen.
    """

    def __init__(
        self,
        model: Transformer,
        sampling: Sampling,
        block_size: int,
        curve: LatencyCurve,
        *,
        capacity: int,
        on_choice: Callable[[Choice], None] = lambda choice: None,
        **options: Any,
    ) -> None:
        """`on_choice` is called with the choice once it is made; the rest as for `StepEngine`."""
        linear = model.config.linear_drafts
        largest = StepShape.one_block if linear else StepShape.full
        super().__init__(model, sampling, largest(block_size), capacity=capacity, **options)
        self._conditions = Conditions(
            curve, capacity // 2, self.batch_size, sampling.greedy, linear
        )
        self._on_choice = on_choice
        self._size, self._headed = block_size, model.draft_head is not None
        # Of drafts made with their block, and without: how many came to be verified by position,
        # and how many of these were accepted.
        record = None if linear or model.draft_record is None else model.draft_record
        measured = None if record is None else record.at(sampling.greedy)
        self._counts = {
            True: Counts.of(block_size, None if measured is None else measured.block),
            False: Counts.of(block_size, None if measured is None else measured.alone),
        }
        self._left = TRIAL_STEPS if block_size > 1 else 0
        self._trials = 1 + self._headed if block_size > 1 else 0
        if self._trials:
            self._take_first_step(measured)

    def _take_first_step(self, measured: Acceptance | None) -> None:
        """The first step: the best by what was measured, or one on trial."""
        complete = measured is not None and (measured.alone is not None or not self._headed)
        choice = self._choose(drafting=not complete)
        if complete and choice.shape.drafting:
            self._trials = 0
            self._on_choice(choice)
        elif complete:
            choice = self._choose(drafting=True)
        self.reshape(choice.shape)

    def acceptance(self) -> Acceptance:
        """For positions 1 … K - 1: accepted of those reached, drawn towards the prior."""
        alone = self._counts[False].rates() if self._headed else None
        return Acceptance(self._counts[True].rates(), alone)

    @torch.inference_mode()
    def step(self) -> list[list[int]]:
        """As in `StepEngine`; behind the last step of a trial the choice is made."""
        with_block = list(self.with_block)
        final = super().step()
        for tokens, drafts, block in zip(final, self.verified, with_block, strict=True):
            if drafts and tokens:
                self._left -= 1
                self._counts[block].add(len(tokens), drafts)
        if self._left <= 0 and self.shape.drafting:
            self._look()
        return final

    def _look(self) -> None:
        """Behind so many drafts: the next trial, the choice, or a better one."""
        self._left = TRIAL_STEPS if self._trials > 1 else REVIEW_STEPS
        if self._trials == 2:
            self._trials = 1
            self.reshape(StepShape(self._size, self._size))
            return
        choice = self._choose(drafting=False)
        if self._trials:
            self._trials = 0
            self._on_choice(choice)
        elif not self._is_better(choice):
            return
        if choice.shape != self.shape:
            self.reshape(choice.shape)

    def _is_better(self, choice: Choice) -> bool:
        now = expected(self.shape, self.acceptance(), self._conditions)
        return choice.tokens_per_second > BETTER * now.tokens_per_second

    def _choose(self, *, drafting: bool) -> Choice:
        return choose(self.acceptance(), self._conditions, drafting=drafting)


@dataclass
class Counts:
    """Of drafts by position 1 … K - 1."""

    reached: list[int]
    accepted: list[int]

    prior: list[float]
    """The acceptance taken for granted before anything is counted."""
    prior_steps: int
    """How many steps that counts for."""

    @classmethod
    def of(cls, block_size: int, measured: Sequence[float] | None = None) -> "Counts":
        """None yet; `measured` elsewhere, for as many positions as are known."""
        positions = block_size - 1
        steps = PRIOR_STEPS if measured is None else MEASURED_STEPS
        prior = [*(measured or ())][:positions]
        prior += [prior[-1] if prior else PRIOR] * (positions - len(prior))
        return cls([0] * positions, [0] * positions, prior, steps)

    def add(self, final: int, drafts: int) -> None:
        """A step that made `final` tokens final came to verify as many drafts, if it had them."""
        for place in range(min(final, drafts)):
            self.reached[place] += 1
            self.accepted[place] += place < final - 1

    def rates(self) -> list[float]:
        return [
            (accepted + prior * self.prior_steps) / (reached + self.prior_steps)
            for accepted, reached, prior in zip(
                self.accepted, self.reached, self.prior, strict=True
            )
        ]
