"""The step chosen while decoding: from the machine's latency curve and what is accepted so far.

The first steps draft with all K positions and the blocks that pay at a middling acceptance; a
draft head then drafts as many without any block. Behind these trials the acceptance by position is
known well enough, and the rest is decoded with the step that pays most, plain steps where drafting
does not pay; while it drafts, the choice is looked at again from time to time. Nothing decoded on
trial is lost.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.decoding.choice import Acceptance, Choice, Conditions, choose, expected
from pipeline.decoding.engine import StepEngine
from pipeline.decoding.latency import LatencyCurve
from pipeline.decoding.sampling import Sampling
from pipeline.decoding.step import StepShape
from pipeline.model.transformer import Transformer

TRIAL_STEPS = 16
"""Steps with a draft, of all rows together, in each trial."""
REVIEW_STEPS = 64
"""Steps with a draft between one look at the choice and the next."""
BETTER = 1.05
"""By how much another step must promise to be better for a change: each loses a draft."""
PRIOR, PRIOR_STEPS = 0.7, 2
"""The acceptance assumed at every position, and the number of steps that it counts for."""


class AutomaticEngine(StepEngine):
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
        chosen: Callable[[Choice], None] = lambda choice: None,
        **options: Any,
    ) -> None:
        """`chosen` is told the choice when it is made; the rest as for `StepEngine`."""
        linear = model.config.linear_drafts
        largest = StepShape.one_block if linear else StepShape.full
        super().__init__(model, sampling, largest(block_size), capacity=capacity, **options)
        self._conditions = Conditions(
            curve, capacity // 2, self.batch_size, sampling.greedy, linear
        )
        self._chosen = chosen
        self._size, self._headed = block_size, model.draft_head is not None
        # Of drafts made with their block, and without: how many came to be verified by position,
        # and how many of these were accepted.
        self._counts = {with_block: Counts.of(block_size) for with_block in (True, False)}
        self._left = TRIAL_STEPS if block_size > 1 else 0
        self._trials = 1 + self._headed if block_size > 1 else 0
        if self._trials:
            self.reshape(self._choose(drafting=True).shape)

    def acceptance(self) -> Acceptance:
        """For positions 1 … K - 1: accepted of those reached, drawn towards the prior."""
        alone = self._counts[False].rates() if self._headed else None
        return Acceptance(self._counts[True].rates(), alone)

    @torch.inference_mode()
    def step(self) -> list[list[int]]:
        """As in `StepEngine`; behind the last step of a trial the choice is made."""
        with_block = list(self.with_block)
        made = super().step()
        for tokens, drafts, block in zip(made, self.verified, with_block, strict=True):
            if drafts and tokens:
                self._left -= 1
                self._counts[block].add(len(tokens), drafts)
        if self._left <= 0 and self.shape.drafting:
            self._look()
        return made

    def _look(self) -> None:
        """At what was found: the next trial, the choice, or a better one."""
        self._left = TRIAL_STEPS if self._trials > 1 else REVIEW_STEPS
        if self._trials == 2:
            self._trials = 1
            self.reshape(StepShape(self._size, self._size))
            return
        choice = self._choose(drafting=False)
        if self._trials:
            self._trials = 0
            self._chosen(choice)
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

    @classmethod
    def of(cls, block_size: int) -> "Counts":
        return cls([0] * (block_size - 1), [0] * (block_size - 1))

    def add(self, final: int, drafts: int) -> None:
        """A step that made `final` tokens final came to verify as many drafts, if it had them."""
        for place in range(min(final, drafts)):
            self.reached[place] += 1
            self.accepted[place] += place < final - 1

    def rates(self) -> list[float]:
        return [
            (accepted + PRIOR * PRIOR_STEPS) / (reached + PRIOR_STEPS)
            for accepted, reached in zip(self.accepted, self.reached, strict=True)
        ]
