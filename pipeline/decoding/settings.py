"""Settings of `tidar-generate`."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from data_prep.tokenizers.load import Tokenizer
from pipeline.decoding.choice import Choice
from pipeline.decoding.document_prompts import DocumentPrompts
from pipeline.decoding.methods import CONFIDENCE
from pipeline.decoding.options import DecodeOptions
from pipeline.decoding.prompts import FilePrompts, Share, read_prompts
from pipeline.decoding.sampling import Sampling
from pipeline.decoding.text import StopStrings
from pipeline.model.loading import load_model
from pipeline.model.transformer import Transformer
from tidar_common.errors import UserError


@dataclass(frozen=True)
class GenerateConfig:
    """Keys of `conf/generate.yaml`; those of decoding are checked where they are used."""

    checkpoint: str
    prompt: str = ""
    prompt_file: str | None = None
    method: str = "tidar"
    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0
    trust: float = 1.0
    block_size: int | None = None
    dtype: str | None = None
    device: str | None = None
    colors: str = "auto"
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: list[str] = field(default_factory=list)
    show: bool = False
    prompts_file: str | None = None
    prompts_data: str | None = None
    prompts_split: str = "train"
    prompt_tokens: int | None = 64
    prompts_limit: int | None = None
    array: str | None = None
    output: str | None = None
    batch_size: int = 1
    blocks: Any = None
    draft_model: str | None = None
    confidence: float = CONFIDENCE

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

    def rows(self, share: Share) -> FilePrompts | None:
        """The share's prompts of `prompts_file`; None where there is none."""
        if self.prompts_file is None:
            return None
        path = Path(self.prompts_file).expanduser()
        return FilePrompts(read_prompts(path, "prompts_file"), share, self.prompts_limit)

    def document_prompts(self, tokenizer: Tokenizer, share: Share) -> DocumentPrompts:
        """The share's prompts of `prompts_data`, whose tokenizer must be the model's."""
        assert self.prompts_data is not None, "the caller looks"
        return DocumentPrompts(
            Path(self.prompts_data).expanduser(),
            tokenizer,
            split=self.prompts_split,
            prompt_tokens=self.prompt_tokens,
            limit=self.prompts_limit,
            share=share,
        )

    def sampling(self) -> Sampling:
        """How tokens are drawn."""
        return Sampling(**{item.name: getattr(self, item.name) for item in fields(Sampling)})

    def options(self, tokenizer: Tokenizer, on_choice: Callable[[Choice], None]) -> DecodeOptions:
        """How each prompt is continued by a model with this `tokenizer`; loads the draft model."""
        draft_model = None
        if self.draft_model is not None:
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


def load_draft_model(
    path: str,
    tokenizer: Tokenizer,
    key: str,
    *,
    dtype: torch.dtype | str | None,
    device: torch.device | str | None,
) -> Transformer:
    """The model at `path`; raises UserError naming `key` unless it has the same `tokenizer`."""
    model, its_tokenizer = load_model(path, dtype=dtype, device=device)
    if its_tokenizer.content() != tokenizer.content():
        raise UserError(
            f"{key}: {path} was trained with another tokenizer; give a model with the same one"
        )
    return model
