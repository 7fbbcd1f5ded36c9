"""Settings of the decode-speed eval, shared by training and `tidar-evaluate`."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class DecodeSpeedConfig:
    """Decoding of held-out prompts with both methods, and drafts scored on held-out text."""

    every: int = 0
    """Optimizer steps between evals during training; 0 runs one at the end only."""
    prompts: int = 16
    """Held-out documents that are continued, spread over all ranks."""
    prompt_tokens: int = 64
    """Tokens of each prompt, from a document's start."""
    max_new_tokens: int = 64
    """Tokens decoded for each prompt, by each method at each temperature."""
    block_size: int | None = None
    """K of the decoder; None takes the one trained with."""
    temperatures: list[float] = field(default_factory=lambda: [0.0, 1.0])
    score_sequences: int = 32
    """Held-out packed sequences on which losses and acceptance are measured."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("prompts", "prompt_tokens", "max_new_tokens", "score_sequences"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.every < 0:
            raise ValueError(f"every must be 0 or more, got {self.every}")
        if not self.temperatures or min(self.temperatures) < 0:
            raise ValueError("temperatures must be a list of numbers, each 0 or above")
