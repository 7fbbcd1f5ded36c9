"""The config of `tidar-prepare`, checked."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from data_prep.corpora import READERS, Document
from data_prep.corpora.mix import MixConfig
from data_prep.filters.config import (
    C4Rules,
    DecontaminateConfig,
    DedupConfig,
    FiltersConfig,
    FineWebRules,
    QualityRules,
    RepetitionRules,
)
from data_prep.layout import LOSS_SPANS, BlockSizes
from data_prep.stages.pack import PACKINGS
from tidar_common.config import array_share, config_hash, parse
from tidar_common.errors import UserError
from tidar_common.schema import NO_VALUE, Choice, Command, defaults, register
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
    """sentencepiece or huggingface."""
    path: str | None = None
    """An existing tokenizer: a file, a folder or an id on the hub; None trains a SentencePiece
    model."""
    vocab_size: int = 4096
    """Pieces of a trained model, control and byte pieces included."""
    model_type: str = "unigram"
    """unigram (encodes several times faster) or bpe."""
    sample_bytes: int = 2_000_000
    """Bytes of text that a trained model sees, drawn from the whole training split."""
    eos_token: str | None = None
    """End-of-document token; None takes the one of tokenizer_config.json, or a usual name."""

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
    """K, the most positions a block drafts."""
    coverage: float = 1.0
    """Share of the positions that are drafted, in (0, 1]; below 1 the mask section is shorter."""
    shift: bool = False
    """Let blocks start anywhere: each document's grid is moved by 0 to K-1 positions; below full
    coverage each block has a place of its own."""
    block_sizes: list[int] | None = None
    """Values of K up to block_size, of which each sequence draws one, such as [4,8,16]; None has
    one K."""
    block_shares: list[float] | None = None
    """How often each of them is drawn, such as [1,1,2]; None draws all alike."""
    loss_span: str = "document"
    """What is learnt: document, or response, what stands behind its prompt
    (corpus.prompt_field)."""

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
class PrepareKeys:
    """The keys of `tidar-prepare` that stand in no section."""

    output_dir: Path
    """Folder to write: manifest.json, the tokenizer, train/*.tar and heldout/*.tar."""
    sequence_length: int = 1024
    """Tokens of a packed sequence."""
    heldout_fraction: float | None = None
    """Share of the documents that is held out, in [0, 1), by a hash of the seed and the document's
    id; None takes 0.01, and more of a text below 5 MB, at most 0.1. With 0 a run has no evals."""
    heldout_path: str | None = None
    """Another file or folder of the corpus' kind: what it holds is held out, and nothing of the
    corpus."""
    packing: str = "best_fit"
    """best_fit (a document that fits is never cut) or concatenate (no padding, many cuts)."""
    shard_bytes: int = 64_000_000
    """Bytes of a shard, about."""
    shard_sequences: int | None = None
    """Sequences of a shard; None makes it as many as shard_bytes has room for."""
    group_size: int = 32
    """Packed sequences in one sample of a shard; one read fetches a whole sample."""
    task_bytes: int | None = None
    """Text of a task, done by one core, once. None takes a 64th of the corpus, from 2 to 128 MB."""
    workers: int = 1
    """Tasks done at a time, each by a process. Does not change the output."""
    array: str | None = None
    """i/n does the i-th of n shares of the tasks, i from 0, for n jobs; slurm/prepare.sbatch sets
    it."""
    seed: int = 0
    """Of the held-out split, a trained tokenizer's sample, the shuffle and drawn layouts."""
    verify: bool = False
    """Prepare nothing; read the folder again and check it against its manifest."""
    stats: bool = False
    """Prepare nothing; print what a prepared folder holds, and draw it into its stats.html."""
    inspect: int | None = None
    """Prepare nothing; show this sequence of train, from 0, also as a picture beside the folder."""
    overwrite: bool = False
    """Prepare anew in a folder that is finished."""

    def __post_init__(self) -> None:
        for key, least in (("sequence_length", 2), ("shard_bytes", 1), ("shard_sequences", 1),
                           ("group_size", 1), ("task_bytes", 1), ("workers", 1),
                           ("seed", 0), ("inspect", 0)):  # fmt: skip
            if (value := getattr(self, key)) is not None and value < least:
                raise UserError(f"{key}: must be at least {least}, got {value}")
        if self.heldout_fraction is not None and not 0.0 <= self.heldout_fraction < 1.0:
            raise UserError(f"heldout_fraction: must be in [0, 1), got {self.heldout_fraction}")
        if self.heldout_fraction and self.heldout_path is not None:
            raise UserError("heldout_fraction: not with heldout_path, which is held out whole")
        if self.packing not in PACKINGS:
            raise UserError(f"packing: {self.packing!r} is not {' or '.join(PACKINGS)}")
        self.array_share()  # a mistake in it shows now
        if self.array is not None and self.overwrite:
            raise UserError("overwrite: not with array; remove the folder before the jobs start")

    def array_share(self) -> tuple[int, int]:
        """The i and n of `array=i/n`: this process does the tasks t with t mod n = i."""
        return array_share(self.array)


@dataclass(frozen=True, kw_only=True)
class PrepareSettings(PrepareKeys):
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
        values = dict(vars(parse(PrepareKeys, plain, "")))
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
        if self.heldout_fraction is not None or self.heldout_path is not None:
            return self
        fraction = max(LARGE_CORPUS_SHARE, HELD_OUT_BYTES / max(text_bytes, 1))
        return replace(self, heldout_fraction=min(fraction, SMALL_CORPUS_SHARE))

    @property
    def holds_out(self) -> bool:
        """Whether there is to be a held-out split."""
        return self.heldout_fraction != 0 or self.heldout_path is not None

    def split_of(self, document: Document) -> str:
        """`train` or `heldout`: what the corpus says, or by a hash of the document's id, the same
        whatever else is in the corpus."""
        if document.split:
            return document.split
        fraction = LARGE_CORPUS_SHARE if self.heldout_fraction is None else self.heldout_fraction
        held_out = in_heldout(document.id, seed=self.seed, fraction=fraction)
        return "heldout" if held_out else "train"


def in_heldout(document_id: str, *, seed: int, fraction: float) -> bool:
    """Whether a document belongs to the held-out split, about `fraction` of all."""
    # Ids from file names and JSON may hold lone surrogates, which plain UTF-8 refuses.
    key = f"{seed}\n{document_id}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") / 2**64 < fraction


ABOUT = """\
tidar-prepare: raw text to packed, laid-out, sharded training sequences.

  tidar-prepare output_dir=data/stdlib sequence_length=256
  tidar-prepare corpus=jsonl corpus.path=text/ output_dir=data/mine workers=16
  tidar-prepare tokenizer=huggingface tokenizer.path=Qwen2.5-1.5B/ sequence_length=4096 ...
  tidar-prepare verify=true output_dir=data/mine
  tidar-prepare stats=true output_dir=data/mine
  tidar-prepare inspect=0 output_dir=data/mine

The same command continues an interrupted preparation.
Exit codes: 0 done, 2 bad config or input, 130 interrupted.
"""
CORPORA = {
    "python_stdlib": "The library of the Python that runs this: about 10 MB of text.",
    "text_folder": "A folder of text files, one document each.",
    "jsonl": "JSON lines, plain or compressed, one document a line.",
    "parquet": "Parquet files, one document a row; needs the parquet extra.",
    "arrow": "A folder that Hugging Face datasets saved to disk, one document a row; needs the "
    "parquet extra.",
    "webdataset": "Tars of text as webdataset has them, one document a sample.",
    "mix": "Several corpora, each with a share of the tokens.",
}
GOPHER = {"repetition": defaults(RepetitionRules), "quality": defaults(QualityRules)}
FINEWEB = {**GOPHER, "c4": defaults(C4Rules), "fineweb": defaults(FineWebRules)}
SCHEMAS = {**{name: schema for name, (schema, _) in READERS.items()}, "mix": MixConfig}
PREPARE = Command(
    "prepare", ABOUT, PrepareKeys,
    {"layout": LayoutConfig, "dedup": DedupConfig, "decontaminate": DecontaminateConfig},
    {"corpus": "python_stdlib", "filters": "none", "tokenizer": "sentencepiece"},
)  # fmt: skip
register(
    PREPARE,
    *(Choice("corpus", name, SCHEMAS[name], text) for name, text in CORPORA.items()),
    Choice("filters", "none", FiltersConfig, "No rules of quality."),
    Choice(
        "filters", "gopher", FiltersConfig,
        "Gopher's rules (arXiv 2112.11446), for English web text; needs the filters extra.", GOPHER,
    ),
    Choice(
        "filters", "fineweb", FiltersConfig,
        "FineWeb's rules (arXiv 2406.17557): Gopher's, C4's and its own; needs the filters extra.",
        FINEWEB,
    ),
    Choice(
        "tokenizer", "sentencepiece", TokenizerConfig, "Trained on the corpus, or existing.",
        only=("kind", "path", "vocab_size", "model_type", "sample_bytes"),
    ),
    Choice(
        "tokenizer", "huggingface", TokenizerConfig,
        "A tokenizer.json, as that of the base model whose training is continued.",
        {"kind": "huggingface", "path": NO_VALUE}, only=("kind", "path", "eos_token"),
    ),
)  # fmt: skip
