"""Settings of the evals; those of decode speed are shared by training and `tidar-evaluate`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.decoding.methods import CONFIDENCE
from pipeline.evals.decoders import ANSWERING, COMPARED, check_names

BENCHMARKS = ("humaneval", "mbpp", "humaneval_plus", "mbpp_plus")

Check = Callable[[], None]
"""Called by all ranks together, equally often; raises on all of them alike, or on none."""


class EvalInterruptedError(RuntimeError):
    """The eval was left before its end; it has no result and has to be repeated."""


def never() -> None:
    """The check of an eval that runs to its end."""


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
    blocks as the machine's latency curve and the acceptance make them pay), `recurrent` (the draft
    head without mask blocks; left out for models that have none), `block_diffusion`
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
        check_names("methods", self.methods, COMPARED)
        if "ar" not in self.methods:
            raise ValueError(f"methods must have ar among them, got {self.methods}")
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
    texts_file: str | None = None
    """JSON lines with `text` and perhaps `source`, scored by source beside the split."""

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
    decoders: list[str] = field(default_factory=lambda: ["tidar"])
    """How `generate_until` tasks decode, one after the other. Likelihood tasks run plain causal."""
    block_size: int | None = None
    """K of the decoder; None takes the one trained with."""
    trust: float = 0.5
    """Weight of the AR logits in the target of `tidar_diffusion`, which is not lossless."""
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
        check_names("decoders", self.decoders, ANSWERING)
        if not 0.0 <= self.trust < 1.0:
            raise ValueError(f"trust must be in [0, 1), got {self.trust}")
        if self.tasks_dir is not None and not Path(self.tasks_dir).expanduser().is_dir():
            raise ValueError(f"tasks_dir: {self.tasks_dir} is not a folder")
        for name in ("limit", "block_size", "max_new_tokens", "batch_size"):
            _at_least(1, name, getattr(self, name))
        _at_least(0, "num_fewshot", self.num_fewshot)


@dataclass(frozen=True)
class CodeConfig:
    """Code benchmarks; see `conf/evals/code.yaml`."""

    benchmarks: list[str] = field(default_factory=lambda: ["humaneval"])
    humaneval_file: str | None = None
    mbpp_file: str | None = None
    humaneval_plus_file: str | None = None
    mbpp_plus_file: str | None = None
    decoders: list[str] = field(default_factory=lambda: ["ar", "tidar", "tidar_diffusion"])
    trust: float = 0.5
    """Of `tidar_diffusion`."""
    block_size: int | None = None
    samples: int = 1
    temperature: float = 0.0
    k: list[int] = field(default_factory=lambda: [1])
    max_new_tokens: int = 512
    limit: int | None = None
    seed: int = 0
    workers: int = 1
    timeout_s: float = 60.0
    test_seconds: float = 3.0
    memory_gib: float = 4.0
    all_guards: bool = True
    confirm_run_unsafe_code: bool = False

    def __post_init__(self) -> None:
        unknown = [name for name in self.benchmarks if name not in BENCHMARKS]
        if unknown or not self.benchmarks:
            known = ", ".join(BENCHMARKS)
            raise ValueError(f"benchmarks must be some of {known}, got {self.benchmarks}")
        check_names("decoders", self.decoders, ANSWERING)
        if not 0.0 <= self.trust < 1.0:
            raise ValueError(f"trust must be in [0, 1), got {self.trust}")
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 or above, got {self.temperature}")
        for name in ("samples", "max_new_tokens", "workers", "block_size", "limit"):
            _at_least(1, name, getattr(self, name))
        if not self.k or not 1 <= min(self.k) <= max(self.k) <= self.samples:
            raise ValueError(f"k must be from 1 to samples ({self.samples}), got {self.k}")
        if self.temperature == 0 and self.samples > 1:
            raise ValueError("samples must be 1 at temperature 0: all greedy answers are the same")
        for name in ("timeout_s", "test_seconds", "memory_gib"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")

    def file_of(self, benchmark: str) -> str | None:
        path: str | None = getattr(self, f"{benchmark}_file")
        return path


def _at_least(least: int, name: str, value: int | None) -> None:
    if value is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
