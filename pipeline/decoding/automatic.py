"""The step chosen while decoding: from the machine's latency curve and what is accepted so far.

The first steps draft with all K positions and the blocks that pay at a middling acceptance. After
`TRIAL_STEPS` of them the acceptance by position is known well enough, and the rest is decoded with
the step that pays most, plain steps where drafting does not. Nothing decoded on trial is lost.
"""

from collections.abc import Callable
from typing import Any

import torch

from pipeline.decoding.choice import Choice, choose
from pipeline.decoding.engine import StepEngine
from pipeline.decoding.latency import LatencyCurve
from pipeline.decoding.sampling import Sampling
from pipeline.decoding.step import StepShape
from pipeline.model.transformer import Transformer

TRIAL_STEPS = 16
"""Steps with a draft, of all rows together."""
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
        self._linear = model.config.linear_drafts
        largest = StepShape.one_block if self._linear else StepShape.full
        super().__init__(model, sampling, largest(block_size), capacity=capacity, **options)
        self._curve, self._cached, self._chosen = curve, capacity // 2, chosen
        self._reached = [0] * (block_size - 1)
        self._accepted = [0] * (block_size - 1)
        self._trial = TRIAL_STEPS if block_size > 1 else 0
        if self._trial:
            self.reshape(self._choose(drafting=True).shape)

    def acceptance(self) -> list[float]:
        """For positions 1 … K - 1: accepted of those reached, drawn towards the prior."""
        return [
            (accepted + PRIOR * PRIOR_STEPS) / (reached + PRIOR_STEPS)
            for accepted, reached in zip(self._accepted, self._reached, strict=True)
        ]

    @torch.inference_mode()
    def step(self) -> list[list[int]]:
        """As in `StepEngine`; behind the last step of the trial the choice is made."""
        made = super().step()
        if self._trial:
            for tokens, drafts in zip(made, self.verified, strict=True):
                if drafts and tokens:
                    self._count(len(tokens), drafts)
            if self._trial <= 0:
                self._trial = 0
                choice = self._choose(drafting=False)
                self._chosen(choice)
                if choice.shape != self.shape:
                    self.reshape(choice.shape)
        return made

    def _count(self, final: int, drafts: int) -> None:
        """A step that made `final` tokens final came to verify as many drafts, if it had them."""
        self._trial -= 1
        for place in range(min(final, drafts)):
            self._reached[place] += 1
            self._accepted[place] += place < final - 1

    def _choose(self, *, drafting: bool) -> Choice:
        return choose(
            self.acceptance(),
            self._curve,
            self._cached,
            batch_size=self.batch_size,
            drafting=drafting,
            linear=self._linear,
        )
