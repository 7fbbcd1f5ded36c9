"""What answers cost: sums over generations, from which the rates of all evals are made."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from pipeline.decoding.batch import Generation


def fourgrams(tokens: Sequence[int]) -> tuple[int, int]:
    """How many runs of four tokens there are, and how many different ones."""
    grams = list(zip(*(tokens[i:] for i in range(4)), strict=False))
    return len(grams), len(set(grams))


@dataclass(frozen=True)
class Cost:
    """Sums over the answers of one decoder; those of several prompts, or ranks, add up with `+`."""

    answers: int = 0
    tokens: int = 0
    forwards: int = 0
    prefill_forwards: int = 0
    prefill_tokens: int = 0
    """That came with the prompts' forwards: one each, but for block diffusion."""
    seconds: float = 0.0
    prefill_seconds: float = 0.0
    matches: int = 0
    """Answers whose tokens equal those of AR decoding."""
    fourgrams: int = 0
    distinct_fourgrams: int = 0
    """Different 4-grams within a generation, summed over generations."""
    reached: Counter[int] = field(default_factory=Counter)
    """Steps that came to verify the draft at a position of the block, by position (1 … K - 1)."""
    accepted: Counter[int] = field(default_factory=Counter)
    """Steps that accepted it."""
    steps: Counter[int] = field(default_factory=Counter)
    """Forwards after the prompt, by their query tokens."""
    step_seconds: Counter[int] = field(default_factory=Counter)
    """Their seconds, likewise."""

    @classmethod
    def of(cls, run: Generation, *, matches: bool = False) -> "Cost":
        """The sums of one generation."""
        grams, distinct = fourgrams(run.tokens)
        reached: Counter[int] = Counter()
        accepted: Counter[int] = Counter()
        for count, drafts in zip(run.accepted, run.drafts, strict=True):
            # d_0 … d_{count-1} were accepted; d_count, where there was one, was looked at and
            # refused. A step without a draft says nothing.
            reached.update(range(1, min(count, drafts) + 1))
            accepted.update(range(1, count))
        steps: Counter[int] = Counter()
        step_seconds: Counter[int] = Counter()
        for queries, seconds in run.steps:
            steps[queries] += 1
            step_seconds[queries] += seconds  # type: ignore[assignment]
        return cls(
            steps=steps,
            step_seconds=step_seconds,
            answers=1,
            tokens=len(run.tokens),
            forwards=run.forwards,
            prefill_forwards=run.prefill_forwards,
            prefill_tokens=run.prefill_tokens,
            seconds=run.seconds,
            prefill_seconds=run.prefill_seconds,
            matches=int(matches),
            fourgrams=grams,
            distinct_fourgrams=distinct,
            reached=reached,
            accepted=accepted,
        )

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        )

    @property
    def tokens_per_forward(self) -> float:
        """T/NFE, the prompts' forwards included."""
        return self.tokens / max(self.forwards, 1)

    @property
    def tokens_per_decoding_forward(self) -> float | None:
        """Prompts and the tokens that come with them left out; None where nothing followed."""
        forwards = self.forwards - self.prefill_forwards
        return (self.tokens - self.prefill_tokens) / forwards if forwards else None

    @property
    def seconds_per_decoding_forward(self) -> float | None:
        """Of the steps after the prompt."""
        forwards = self.forwards - self.prefill_forwards
        return (self.seconds - self.prefill_seconds) / forwards if forwards else None

    @property
    def tokens_per_second(self) -> float:
        """Of one process: where ranks decode side by side, their seconds add up."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def distinct_4grams(self) -> float | None:
        """Share of 4-grams that are the first of their kind; None for texts under 4 tokens."""
        return self.distinct_fourgrams / self.fourgrams if self.fourgrams else None

    def rates(self) -> dict[str, Any]:
        """Sums, tokens per forward and per second, prompts included; and the share of distinct
        4-grams, without which tokens per forward say little: repetition is easy to draft."""
        names = (
            "answers", "tokens", "forwards", "seconds",
            "tokens_per_forward", "tokens_per_second", "distinct_4grams",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def seconds_by_queries(self) -> dict[str, float] | None:
        """Mean time of a forward after the prompt, by its query tokens; None without any."""
        means = {str(n): self.step_seconds[n] / self.steps[n] for n in sorted(self.steps)}
        return means or None

    def acceptance(self, block_size: int) -> list[float | None]:
        """For positions 1 … K - 1, the share of the steps that reached it which accepted it."""
        return [
            self.accepted[i] / self.reached[i] if self.reached[i] else None
            for i in range(1, block_size)
        ]
