"""The config of `tidar-prepare`, checked."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from data_prep.filters.config import DecontaminateConfig, DedupConfig, FiltersConfig
from data_prep.layout import LOSS_SPANS, BlockSizes
from data_prep.stages.pack import PACKINGS
from tidar_common.config import array_share, config_hash, parse
from tidar_common.errors import UserError
from tidar_common.secrets import without_secrets

GROUPS = ("corpus", "filters", "dedup", "decontaminate", "tokenizer", "layout")
LARGE_CORPUS_SHARE, SMALL_CORPUS_SHARE = 0.01, 0.1
"""Of the documents, held out where nothing is said: the most of a small corpus, else the least."""
HELD_OUT_BYTES = 50_000
"""Text that is to be held out of a corpus in between."""
IRRELEVANT_KEYS = ("output_dir", "workers", "array", "verify", "stats", "inspect", "overwrite")
"""Keys that do not change what is written."""


@dataclass(frozen=True)
class TokenizerConfig:
    kind: str = "sentencepiece"
    """`sentencepiece` or `huggingface`."""
    path: str | None = None
    """An existing tokenizer (file or folder); None trains a SentencePiece model on the corpus."""
    vocab_size: int = 4096
    """Pieces of a trained model, control and byte pieces included."""
    model_type: str = "unigram"
    """`unigram` (encodes several times faster) or `bpe`."""
    sample_bytes: int = 2_000_000
    """Text that a trained model sees, drawn from the whole training split."""
    eos_token: str | None = None
    """End-of-document token of a Hugging Face tokenizer; None tries the usual names."""

    def __post_init__(self) -> None:
        if self.kind not in ("sentencepiece", "huggingface"):
            raise UserError(
                f"tokenizer.kind: unknown value {self.kind!r}; known are sentencepiece, huggingface"
            )
        if self.kind == "huggingface" and self.path is None:
            raise UserError("tokenizer.path: has no value; give the tokenizer.json or its folder")
        if self.model_type not in ("unigram", "bpe"):
            raise UserError(f"tokenizer.model_type: {self.model_type!r} is not unigram or bpe")
        if self.vocab_size < 300:
            raise UserError(
                f"tokenizer.vocab_size: {self.vocab_size} is below 300; 256 bytes and the control "
                "symbols are part of it"
            )
        if self.sample_bytes < 1:
            raise UserError(f"tokenizer.sample_bytes: must be at least 1, got {self.sample_bytes}")


@dataclass(frozen=True)
class LayoutConfig:
    """See `data_prep.layout.build_layout`."""

    block_size: int = 16
    coverage: float = 1.0
    shift: bool = False
    block_sizes: list[int] | None = None
    """Values of K up to `block_size`, of which each sequence draws one."""
    block_shares: list[float] | None = None
    """How often each is drawn, of any sum; None draws all alike."""
    loss_span: str = "document"
    """`document`, or `response`: prompts of the corpus get no blocks and carry no loss."""

    def __post_init__(self) -> None:
        if self.loss_span not in LOSS_SPANS:
            raise UserError(
                f"layout.loss_span: {self.loss_span!r} is not {' or '.join(LOSS_SPANS)}"
            )
        if self.block_size < 1:
            raise UserError(f"layout.block_size: must be at least 1, got {self.block_size}")
        if not 0.0 < self.coverage <= 1.0:
            raise UserError(f"layout.coverage: must be in (0, 1], got {self.coverage}")
        self.mixed()  # a mistake in it shows now

    def mixed(self) -> BlockSizes | None:
        """The choice of block sizes, None where all sequences have the same."""
        return BlockSizes.checked(self.block_sizes, self.block_shares, self.block_size)


@dataclass(frozen=True)
class PlainKeys:
    """The keys of `conf/prepare.yaml` that stand in no group; they are explained there."""

    output_dir: Path
    sequence_length: int
    heldout_fraction: float | None
    packing: str
    shard_bytes: int
    shard_sequences: int | None
    group_size: int
    task_bytes: int | None
    workers: int
    array: str | None
    seed: int
    verify: bool
    stats: bool
    inspect: int | None
    overwrite: bool

    def __post_init__(self) -> None:
        for key, least in (("sequence_length", 2), ("shard_bytes", 1), ("shard_sequences", 1),
                           ("group_size", 1), ("task_bytes", 1), ("workers", 1),
                           ("seed", 0), ("inspect", 0)):  # fmt: skip
            if (value := getattr(self, key)) is not None and value < least:
                raise UserError(f"{key}: must be at least {least}, got {value}")
        if self.heldout_fraction is not None and not 0.0 < self.heldout_fraction < 1.0:
            raise UserError(f"heldout_fraction: must be in (0, 1), got {self.heldout_fraction}")
        if self.packing not in PACKINGS:
            raise UserError(f"packing: {self.packing!r} is not {' or '.join(PACKINGS)}")
        self.array_share()  # a mistake in it shows now
        if self.array is not None and self.overwrite:
            raise UserError("overwrite: not with array; remove the folder before the jobs start")

    def array_share(self) -> tuple[int, int]:
        """The i and n of `array=i/n`: this process does the tasks t with t mod n = i."""
        return array_share(self.array)


@dataclass(frozen=True)
class PrepareSettings(PlainKeys):
    """Everything `tidar-prepare` is told, but the corpus, which its reader checks."""

    filters: FiltersConfig
    dedup: DedupConfig
    decontaminate: DecontaminateConfig
    tokenizer: TokenizerConfig
    layout: LayoutConfig
    resolved: dict[str, Any]
    """The whole resolved config."""

    @classmethod
    def from_config(cls, cfg: DictConfig) -> "PrepareSettings":
        """Check `cfg`; raises UserError naming the first key that is wrong and the remedy."""
        plain = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in GROUPS])
        values = dict(vars(parse(PlainKeys, plain, "")))
        values["output_dir"] = values["output_dir"].expanduser()
        return cls(
            **values,
            filters=parse(FiltersConfig, cfg.filters, "filters"),
            dedup=parse(DedupConfig, cfg.dedup, "dedup"),
            decontaminate=parse(DecontaminateConfig, cfg.decontaminate, "decontaminate"),
            tokenizer=parse(TokenizerConfig, cfg.tokenizer, "tokenizer"),
            layout=parse(LayoutConfig, cfg.layout, "layout"),
            resolved=without_secrets(OmegaConf.to_container(cfg, resolve=True)),
        )

    @property
    def screens(self) -> bool:
        """Whether documents are looked at, and perhaps left out, before any is packed."""
        return self.filters.any or self.dedup.any or self.decontaminate.any

    @property
    def decisive(self) -> dict[str, Any]:
        """The keys that decide the output, as the manifest records them."""
        return {k: v for k, v in self.resolved.items() if k not in IRRELEVANT_KEYS}

    @property
    def config_hash(self) -> str:
        """SHA-256 of the keys that decide the output."""
        return config_hash(self.decisive)

    def for_corpus(self, text_bytes: int) -> "PrepareSettings":
        """These settings with a share of held-out documents that suits a corpus of that size, where
        none is given: enough of a small one to have some text."""
        if self.heldout_fraction is not None:
            return self
        fraction = max(LARGE_CORPUS_SHARE, HELD_OUT_BYTES / max(text_bytes, 1))
        return replace(self, heldout_fraction=min(fraction, SMALL_CORPUS_SHARE))

    def split_of(self, document_id: str) -> str:
        """`train` or `heldout`, by a hash of the id: the same whatever else is in the corpus."""
        fraction = LARGE_CORPUS_SHARE if self.heldout_fraction is None else self.heldout_fraction
        held_out = in_heldout(document_id, seed=self.seed, fraction=fraction)
        return "heldout" if held_out else "train"


def in_heldout(document_id: str, *, seed: int, fraction: float) -> bool:
    """Whether a document belongs to the held-out split, about `fraction` of all."""
    # Ids from file names and JSON may hold lone surrogates, which plain UTF-8 refuses.
    key = f"{seed}\n{document_id}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") / 2**64 < fraction
