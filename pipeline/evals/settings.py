"""Settings of the evals; those of decode speed are shared by training and `tidar-evaluate`."""

from dataclasses import dataclass, field
from pathlib import Path

from pipeline.decoding.methods import CONFIDENCE

EVAL_METHODS = (
    "ar", "tidar", "tidar_chosen", "block_diffusion", "prompt_lookup", "speculative",
)  # fmt: skip


@dataclass(frozen=True)
class DecodeSpeedConfig:
    """Decoding of the same prompts by several methods, and drafts scored on held-out text."""

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
    repeats: int = 3
    """Times each prompt is decoded by each method; speeds are medians over them."""
    methods: list[str] = field(default_factory=lambda: ["ar", "tidar"])
    """What is compared: `ar` always, `tidar` (with `blocks`), `tidar_chosen` (block length and
    blocks as the machine's latency curve and the acceptance make them pay), `block_diffusion`
    (unmasking without verification), `prompt_lookup` (n-grams of the text so far) and
    `speculative` (drafts of `draft_checkpoint`)."""
    blocks: list[int] | None = None
    """Mask blocks in a step of `tidar`; None takes all."""
    draft_checkpoint: str | None = None
    """The smaller model of `speculative`, with the same tokenizer."""
    confidence: float = CONFIDENCE
    """Probability from which `block_diffusion` keeps a token."""
    prompts_file: str | None = None
    """JSON lines with `prompt` (text) and perhaps `category`; None takes held-out documents."""

    def __post_init__(self) -> None:
        for name in ("prompts", "prompt_tokens", "max_new_tokens", "score_sequences", "repeats"):
            _at_least(1, name, getattr(self, name))
        _at_least(1, "block_size", self.block_size)
        _at_least(0, "every", self.every)
        _at_least(0, "seed", self.seed)
        if not self.temperatures or min(self.temperatures) < 0:
            raise ValueError("temperatures must be a list of numbers, each 0 or above")
        if len(set(self.temperatures)) < len(self.temperatures):
            raise ValueError(f"temperatures must differ from each other, got {self.temperatures}")
        unknown = [name for name in self.methods if name not in EVAL_METHODS]
        if unknown or "ar" not in self.methods or len(set(self.methods)) < len(self.methods):
            raise ValueError(
                f"methods must be different ones of {', '.join(EVAL_METHODS)} with ar among them, "
                f"got {self.methods}"
            )
        if ("speculative" in self.methods) != (self.draft_checkpoint is not None):
            raise ValueError("draft_checkpoint and the method speculative need each other")
        if (
            self.draft_checkpoint is not None
            and not Path(self.draft_checkpoint).expanduser().exists()
        ):
            raise ValueError(f"draft_checkpoint: {self.draft_checkpoint} does not exist")
        if not 0 < self.confidence <= 1:
            raise ValueError(f"confidence must be above 0 and at most 1, got {self.confidence}")
        if self.prompts_file is not None and not Path(self.prompts_file).expanduser().is_file():
            raise ValueError(f"prompts_file: {self.prompts_file} is not a file")


@dataclass(frozen=True)
class LikelihoodConfig:
    """Losses on the held-out split."""

    sequences: int | None = None
    """Packed sequences to score, over all ranks; None scores the whole split."""
    block_size: int | None = None
    """K of the mask section; None takes the one trained with."""
    seed: int = 0
    """Which sequences are taken where not all are."""

    def __post_init__(self) -> None:
        _at_least(1, "sequences", self.sequences)
        _at_least(1, "block_size", self.block_size)


@dataclass(frozen=True)
class TasksConfig:
    """Tasks of lm-evaluation-harness."""

    tasks: list[str] = field(default_factory=list)
    """Names of tasks or groups."""
    tasks_dir: str | None = None
    """Folder with task definitions (YAML) of one's own, beside those of the library."""
    limit: int | None = None
    """Documents of each task, for trying out: scores are then not comparable. None takes all."""
    num_fewshot: int | None = None
    """Examples in the prompt; None takes each task's own number."""
    method: str = "tidar"
    """How `generate_until` tasks decode: `tidar` or `ar`. Likelihood tasks run plain causal."""
    block_size: int | None = None
    """K of the decoder; None takes the one trained with."""
    trust: float = 1.0
    """Weight of the AR logits in the decoder's target; below 1 is not lossless."""
    max_new_tokens: int = 256
    """Longest answer where a task names no limit of its own."""
    batch_size: int = 8
    """Sequences in one causal forward of a likelihood task."""
    seed: int = 0
    """Of sampled answers."""
    confirm_run_unsafe_code: bool = False
    """Let tasks run code that the model wrote (HumanEval, MBPP). Only in a sandbox."""

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("tasks is empty; name at least one, for example tasks=[hellaswag]")
        if self.method not in ("tidar", "ar"):
            raise ValueError(f"method must be tidar or ar, got {self.method!r}")
        if not 0.0 <= self.trust <= 1.0:
            raise ValueError(f"trust must be in [0, 1], got {self.trust}")
        if self.tasks_dir is not None and not Path(self.tasks_dir).expanduser().is_dir():
            raise ValueError(f"tasks_dir: {self.tasks_dir} is not a folder")
        for name in ("limit", "block_size", "max_new_tokens", "batch_size"):
            _at_least(1, name, getattr(self, name))
        _at_least(0, "num_fewshot", self.num_fewshot)


def _at_least(least: int, name: str, value: int | None) -> None:
    if value is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
