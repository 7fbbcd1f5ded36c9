"""Settings of `tidar-generate`; torch is imported where decoding begins."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.decoding.methods import CONFIDENCE
from tidar_common.errors import UserError
from tidar_common.schema import Command, register

if TYPE_CHECKING:
    from data_prep.tokenizers.load import Tokenizer
    from pipeline.decoding.choice import Choice
    from pipeline.decoding.options import DecodeOptions
    from pipeline.decoding.prompts import DocumentPrompts, FilePrompts, Share
    from pipeline.decoding.sampling import Sampling


@dataclass(frozen=True)
class GenerateConfig:
    """The keys of `tidar-generate`; those of decoding are checked where they are used."""

    checkpoint: str
    """A training checkpoint, a run_dir (its latest checkpoint), an export or a Hugging Face
    folder."""
    prompt: str = ""
    """Text to continue, taken letter for letter; - reads standard input."""
    prompt_file: str | None = None
    """A UTF-8 text file to continue, instead of prompt."""
    method: str = "tidar"
    """tidar (several tokens a forward); ar (one); recurrent, the draft head alone; prompt_lookup,
    drafts from the text so far; speculative, drafts of draft_model; block_diffusion, which verifies
    nothing: its text is not that of ar."""
    draft_model: str | None = None
    """A smaller model with the same tokenizer, for method=speculative."""
    max_new_tokens: int = 128
    """Longest continuation; an end token ends it earlier."""
    temperature: float = 0.0
    """0 is greedy."""
    seed: int = 0
    """Of the draws at a temperature above 0."""
    trust: float = 1.0
    """Weight of the AR logits in what is accepted, in [0, 1]; 1 is lossless."""
    top_k: int | None = None
    """Keep the k most probable tokens; None keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this; 1 keeps all."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens that already occurred; 1 is none."""
    stop: list[str] = field(default_factory=list)
    """Texts that end the generation, such as ["\\n\\n"]; only in output files the text is cut
    there."""
    block_size: int | None = None
    """K, positions drafted in a forward; None takes the one trained with."""
    blocks: Any = None
    """Mask blocks in a step of tidar: all, numbers from 1 to K like [1,4], or auto, what pays on
    this machine; greedy text is the same. None is auto, but all where trust is below 1 or sampled
    texts go to a file."""
    confidence: float = CONFIDENCE
    """Probability from which block_diffusion keeps a token, above 0, at most 1."""
    dtype: str | None = None
    """bf16 or fp32; None keeps the type of the weights."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; None takes the GPU where there is one."""
    colors: str = "auto"
    """Colour each token by the forward that made it: true, false, or auto (in a terminal)."""
    show: bool = False
    """Colour in any case, and say at the end how many tokens the forwards gave."""
    prompts_file: str | None = None
    """Many prompts: JSON lines with "prompt", and perhaps "id" and "category"."""
    prompts_data: str | None = None
    """Or a folder written by tidar-prepare with the model's tokenizer: how its documents begin."""
    prompts_split: str = "train"
    """The split of prompts_data: train or heldout. What is made of held-out text spoils evals on
    it."""
    prompt_tokens: int | None = 64
    """Tokens of a document that are its prompt; None takes the prompts that the data was prepared
    with."""
    prompts_limit: int | None = None
    """Most prompts, of all shares together; None takes all. Of prompts_data a sample; raise it and
    others are added."""
    array: str | None = None
    """i/n continues the i-th of n shares of the prompts, i from 0; slurm/generate.sbatch sets
    it."""
    output: str | None = None
    """JSON lines to which their texts are appended; each share has its own,
    answers-00000-of-00008.jsonl."""
    batch_size: int = 1
    """Prompts that are decoded side by side."""

    def __post_init__(self) -> None:
        self.sampling()  # before a model is loaded
        for key in ("prompt_tokens", "prompts_limit"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise UserError(f"{key}: must be at least 1, got {value}")
        if self.prompts_file is not None and self.prompts_data is not None:
            raise UserError("prompts_data: given together with prompts_file; use one of them")
        if self.has_many and (self.prompt or self.prompt_file is not None):
            key = "prompts_file" if self.prompts_data is None else "prompts_data"
            raise UserError(f"{key}: given together with another prompt; use one of them")
        for key in ("output", "array", "prompts_limit"):
            if getattr(self, key) is not None and not self.has_many:
                raise UserError(f"{key}: is for many prompts; give prompts_file or prompts_data")
        if self.blocks in (None, "auto", "all"):
            return
        if not isinstance(self.blocks, list) or not all(type(n) is int for n in self.blocks):
            raise UserError(f"blocks: must be auto, all, or numbers like [1,2]; got {self.blocks}")

    @property
    def has_many(self) -> bool:
        """Whether many prompts go to `output`, rather than one to stdout."""
        return self.prompts_file is not None or self.prompts_data is not None

    def rows(self, share: "Share") -> "FilePrompts | None":
        """The share's prompts of `prompts_file`; None where there is none."""
        if self.prompts_file is None:
            return None
        from pipeline.decoding.prompts import FilePrompts, read_prompts

        path = Path(self.prompts_file).expanduser()
        return FilePrompts(read_prompts(path, "prompts_file"), share, self.prompts_limit)

    def document_prompts(self, tokenizer: "Tokenizer", share: "Share") -> "DocumentPrompts":
        """The share's prompts of `prompts_data`, whose tokenizer must be the model's."""
        from pipeline.decoding.prompts import DocumentPrompts

        assert self.prompts_data is not None, "the caller looks"
        return DocumentPrompts(
            Path(self.prompts_data).expanduser(),
            tokenizer,
            split=self.prompts_split,
            prompt_tokens=self.prompt_tokens,
            limit=self.prompts_limit,
            share=share,
        )

    def sampling(self) -> "Sampling":
        """How tokens are drawn."""
        from pipeline.decoding.sampling import Sampling

        return Sampling(**{item.name: getattr(self, item.name) for item in fields(Sampling)})

    def options(
        self, tokenizer: "Tokenizer", on_choice: "Callable[[Choice], None]"
    ) -> "DecodeOptions":
        """How each prompt is continued by a model with this `tokenizer`; loads the draft model."""
        from pipeline.decoding.options import DecodeOptions
        from pipeline.decoding.text import StopStrings

        draft_model = None
        if self.draft_model is not None:
            from pipeline.model.loading import load_draft_model

            draft_model = load_draft_model(
                self.draft_model, tokenizer, "draft_model", dtype=self.dtype, device=self.device
            )
        return DecodeOptions(
            method=self.method,
            block_size=self.block_size,
            blocks=self._step_blocks(),
            sampling=self.sampling(),
            max_new_tokens=self.max_new_tokens,
            eos_id=tokenizer.eos_id,
            stop=StopStrings(tokenizer, tuple(map(unescaped, self.stop))) if self.stop else None,
            batch_size=self.batch_size if self.has_many else 1,
            draft_model=draft_model,
            confidence=self.confidence,
            on_choice=on_choice,
        )

    def _step_blocks(self) -> tuple[int, ...] | str | None:
        """`auto` also where nothing is said, but for drawn texts that go to a file. There an
        interrupted run must write what a whole one does: greedy text is the same with any blocks,
        drawn text is another draw."""
        if self.blocks is None:
            repeatable = self.has_many and self.temperature > 0
            return "auto" if self.trust == 1 and not repeatable else None
        if isinstance(self.blocks, str):
            return None if self.blocks == "all" else self.blocks
        return tuple(self.blocks)


ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


def unescaped(text: str) -> str:
    r"""`text` with \n, \t, \r, \\ and \uXXXX as what they stand for: Hydra keeps them as they are
    typed. A backslash before anything else is a backslash."""

    def meant(match: re.Match[str]) -> str:
        code = match[1]
        return chr(int(code[1:], 16)) if code[0] == "u" else ESCAPES[code]

    return re.sub(r"\\(n|t|r|\\|u[0-9a-fA-F]{4})", meant, text)


ABOUT = """\
tidar-generate: continue a text with a trained model. New text goes to stdout as it comes, a
line with tokens per forward and tokens/s to stderr.

  tidar-generate checkpoint=runs/first prompt='def add(a, b):'
  tidar-generate checkpoint=exports/first prompt_file=start.txt temperature=0.8 seed=1
  tidar-generate checkpoint=runs/first prompt='import' method=ar
  cat start.txt | tidar-generate checkpoint=runs/first prompt=-
  tidar-generate checkpoint=runs/first prompts_file=in.jsonl output=out.jsonl batch_size=8
  tidar-generate checkpoint=runs/first prompts_data=data/stdlib prompts_limit=1000 \\
      output=out.jsonl batch_size=32 temperature=1

The prompt needs the shell's quotes only: spaces, quotes, braces, commas, dollars and newlines
in it are taken as they are.
"""
register(Command("generate", ABOUT, GenerateConfig))
