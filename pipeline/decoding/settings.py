"""Settings of `tidar-generate`."""

from dataclasses import dataclass, field

from pipeline.decoding.sampling import Sampling
from pipeline.model.loading import load_model
from pipeline.model.transformer import Transformer


@dataclass(frozen=True)
class GenerateConfig:
    """Keys of `conf/generate.yaml`; values are checked where they are used."""

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
    output: str | None = None
    batch_size: int = 1
    blocks: list[int] | None = None
    draft_model: str | None = None

    def sampling(self) -> Sampling:
        return Sampling(
            self.temperature,
            self.trust,
            self.seed,
            self.top_k,
            self.top_p,
            self.repetition_penalty,
        )

    def smaller_model(self) -> Transformer | None:
        """The model that writes drafts for `method=speculative`, where one is named."""
        if self.draft_model is None:
            return None
        return load_model(self.draft_model, dtype=self.dtype, device=self.device)[0]
