"""The shape of a model: all that is needed to build one, and nothing of how it is trained."""

import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from tidar_common.errors import UserError
from tidar_common.files import read_text_checked
from tidar_common.schema import INTERNAL

DRAFT_CELLS = ("linear", "mlp", "gru")
DRAFTING_FIELDS = (
    "draft_rank", "draft_cell", "draft_width", "adapter_rank", "adapter_targets",
    "own_mask_embedding", "causal_slots", "linear_drafts",
)  # fmt: skip
"""Fields of `ModelConfig` that no Hugging Face config has: what drafting adds to a base model."""
BACKENDS = ("auto", "flex", "tiles", "dense")
"""Of attention; `auto` is flex on a GPU and tiles on a CPU."""
CHECKPOINTING = ("none", "selective", "full")
"""What is computed again in the backward pass: nothing, the feed-forward layers' activations (no
matrix product), or whole layers."""
ADAPTER_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
KINDS = {
    "linear": ("factor",),
    "llama3": (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    ),
    "yarn": ("factor", "original_max_position_embeddings"),
}  # fmt: skip
"""Kinds of scaling, and the numbers that each must have."""
OPTIONAL = {"yarn": ("attention_factor", "beta_fast", "beta_slow")}
KIND = "rope_type"


def check_scaling(scaling: dict[str, Any] | None) -> None:
    """Raises ValueError for a scaling that is not implemented, or lacks a number."""
    if scaling is None:
        return
    kind = scaling.get(KIND)
    if kind not in KINDS:
        raise ValueError(f"rope_scaling.{KIND} must be one of {', '.join(KINDS)}, got {kind!r}")
    for name in KINDS[kind]:
        if not isinstance(scaling.get(name), int | float):
            raise ValueError(f"rope_scaling.{name} must be a number for {kind}")
    known = {KIND, *KINDS[kind], *OPTIONAL.get(kind, ())}
    if unknown := sorted(set(scaling) - known):
        raise ValueError(f"rope_scaling.{unknown[0]} is not implemented for {kind}")


def block_slots(block_size: int, linear: bool) -> int:
    """Slots of a block that drafts `block_size` places, with `linear` drafts from any of the first
    `block_size` on."""
    return 2 * block_size - 1 if linear else block_size


@dataclass(frozen=True)
class AdapterConfig:
    """What of a model acts on mask slots alone, beside the draft head."""

    rank: int = 0
    """Rank of low-rank updates that act on mask slots alone; 0 is none."""
    targets: tuple[str, ...] = ADAPTER_TARGETS
    """The projections that have one."""
    own_mask_embedding: bool | None = None
    """Give mask slots an embedding outside of the embedding matrix; None does with freeze_base."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"rank must be 0 (none) or more, got {self.rank}")
        for name in self.targets:
            if name not in ADAPTER_TARGETS:
                known = ", ".join(ADAPTER_TARGETS)
                raise ValueError(f"targets: no projection {name!r}; known are {known}")
        if self.rank and not self.targets:
            raise ValueError("targets names no projection; name one, or set rank=0")


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer of the Qwen2, Qwen3 or Llama family.

    The families differ in two switches: Qwen2 has `qkv_bias`, Qwen3 has `qk_norm`, Llama neither.
    """

    hidden_size: int
    """Width of the residual stream."""
    intermediate_size: int
    """Width of the SwiGLU feed-forward layer."""
    num_layers: int
    """Transformer layers."""
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key/value heads of grouped-query attention; divides num_heads."""
    head_dim: int
    """Width of a head, even."""
    vocab_size: int | None = None
    """Rows of the embedding; None takes the tokenizer's."""
    max_positions: int = 4096
    """Longest sequence, in tokens, that the model is meant for."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: dict[str, Any] | None = field(default=None, metadata=INTERNAL)
    """How rotary frequencies are stretched, in Hugging Face's words: `rope_type` linear, llama3 or
    yarn, and its numbers. None does not."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square in RMSNorm."""
    qkv_bias: bool = False
    """Biases of the query, key and value projections, as Qwen2 has."""
    qk_norm: bool = False
    """RMSNorm of queries and keys, as Qwen3 has."""
    tie_embeddings: bool = True
    """One matrix for the input embedding and the LM head."""
    mask_token_id: int | None = field(default=None, metadata=INTERNAL)
    """Token that stands in every mask slot; None for a model that was never trained to draft."""
    block_size: int | None = field(default=None, metadata=INTERNAL)
    """K that the model was trained with, the default for decoding."""
    draft_rank: int = 0
    """Rank of the sequential draft head; 0 is none."""
    draft_cell: str = "gru"
    """What the head remembers of the tokens before a place: linear (the last one), mlp (the same,
    two layers) or gru (all of the draft)."""
    draft_width: int | None = None
    """Width of the head's cell (mlp, gru); None takes hidden_size."""
    adapter_rank: int = field(default=0, metadata=INTERNAL)
    """Rank of the low-rank updates that act on mask-slot rows alone; 0 is none."""
    adapter_targets: tuple[str, ...] = field(default=(), metadata=INTERNAL)
    """The projections that have them, some of `ADAPTER_TARGETS`."""
    own_mask_embedding: bool = field(default=False, metadata=INTERNAL)
    """Mask slots have an embedding of their own, beside the matrix: training it leaves the AR half
    as it is, even where the matrix is the LM head, too."""
    causal_slots: bool = field(default=False, metadata=INTERNAL)
    """A slot sees only earlier slots of its block, instead of all."""
    hosted: dict[str, Any] | None = field(default=None, metadata=INTERNAL)
    """Content of `config.json` of a model whose layers transformers runs; None is the compact
    transformer. Of the fields above it only sizes count then."""
    hosted_elements: int = field(default=0, metadata=INTERNAL)
    """Parameters of those layers and the final norm."""
    linear_drafts: bool = field(default=False, metadata=INTERNAL)
    """Blocks have 2K - 1 slots, and drafts may begin at any of the first K (linear drafting)."""

    def __post_init__(self) -> None:
        sizes = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "head_dim",
                 "max_positions", "vocab_size")  # fmt: skip
        for name in sizes:
            if (size := getattr(self, name)) is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        for name in ("rope_theta", "rms_norm_eps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads ({self.num_kv_heads}) must divide num_heads ({self.num_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")
        check_scaling(self.rope_scaling)
        self._check_drafting()
        # In one order; from JSON it comes as a list.
        targets = tuple(name for name in ADAPTER_TARGETS if name in self.adapter_targets)
        object.__setattr__(self, "adapter_targets", targets)
        mask, rows = self.mask_token_id, self.vocab_size
        if mask is not None and rows is not None and not 0 <= mask < rows:
            raise ValueError(f"mask_token_id {mask} is outside vocab_size {rows}")

    def _check_drafting(self) -> None:
        for name in ("draft_rank", "adapter_rank"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 (none) or more, got {getattr(self, name)}")
        if self.draft_cell not in DRAFT_CELLS:
            known = ", ".join(DRAFT_CELLS)
            raise ValueError(f"draft_cell must be one of {known}, got {self.draft_cell!r}")
        if self.draft_width is not None and self.draft_width < 1:
            raise ValueError(f"draft_width must be at least 1, got {self.draft_width}")
        unknown = [name for name in self.adapter_targets if name not in ADAPTER_TARGETS]
        if unknown:
            known = ", ".join(ADAPTER_TARGETS)
            raise ValueError(f"adapter_targets: no projection {unknown[0]!r}; known are {known}")
        if self.adapter_rank and not self.adapter_targets:
            raise ValueError("adapter_rank is above 0, but adapter_targets names no projection")
        if self.linear_drafts and not self.draft_rank:
            raise ValueError("linear_drafts needs a draft head; set draft_rank above 0")

    @property
    def family(self) -> str:
        """Name of the Hugging Face architecture; `qwen2`, `qwen3` or `llama` by the switches."""
        if self.hosted is not None:
            return str(self.hosted["model_type"])
        if self.qk_norm:
            return "qwen3"
        return "qwen2" if self.qkv_bias else "llama"

    @property
    def num_embeddings(self) -> int:
        """`vocab_size`, which must be known by the time a model is built."""
        if self.vocab_size is None:
            raise ValueError("vocab_size is not set")
        return self.vocab_size

    @property
    def num_parameters(self) -> int:
        """All parameters; tied embeddings count once."""
        return self.num_base_parameters + self.num_drafting_parameters

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of a layer's matrices, by name; some of them have adapters."""
        width, inner = self.hidden_size, self.intermediate_size
        query, key_value = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        sizes = ((width, query), (width, key_value), (width, key_value), (query, width),
                 (width, inner), (width, inner), (inner, width))  # fmt: skip
        return dict(zip(ADAPTER_TARGETS, sizes, strict=True))

    @property
    def adapter_elements(self) -> int:
        """Elements of one layer's adapters."""
        if not self.adapter_rank:
            return 0
        return self.adapter_rank * sum(sum(self.projections[n]) for n in self.adapter_targets)

    @property
    def num_drafting_parameters(self) -> int:
        """Those that only draft; a frozen base trains no others."""
        embedding = self.hidden_size if self.own_mask_embedding else 0
        return self.num_layers * self.adapter_elements + embedding + self.num_draft_parameters

    @property
    def num_base_parameters(self) -> int:
        """Those of the model without weights that only draft."""
        width, head = self.hidden_size, self.head_dim
        query, key_value = self.num_heads * head, self.num_kv_heads * head
        attention = width * (query + 2 * key_value) + query * width
        attention += (query + 2 * key_value) if self.qkv_bias else 0
        attention += 2 * head if self.qk_norm else 0
        layer = attention + 3 * width * self.intermediate_size + 2 * width
        embeddings = self.num_embeddings * width * (1 if self.tie_embeddings else 2)
        if self.hosted is not None:
            return self.hosted_elements + embeddings
        return self.num_layers * layer + embeddings + width

    @property
    def num_draft_parameters(self) -> int:
        """Those of the sequential draft head; 0 without one."""
        if not self.draft_rank:
            return 0
        size, rank = self.hidden_size, self.draft_rank
        width = self.draft_width or size
        cells = {
            "linear": 2 * size * rank,
            "mlp": 2 * size * width + width + width * rank,
            "gru": 3 * width * (2 * size + width + 2) + width * (size + 1) + width * rank,
        }
        return cells[self.draft_cell] + rank * self.num_embeddings + size + size**2

    @property
    def num_cell_products(self) -> int:
        """Multiply-adds of the draft head's cell for each place, forward."""
        size, rank = self.hidden_size, self.draft_rank
        width = self.draft_width or size
        if not rank:
            return 0
        return {
            "linear": 2 * size * rank,
            "mlp": 2 * size * width + width * rank,
            "gru": 3 * width * (2 * size + width) + width * rank,
        }[self.draft_cell]

    def with_tokens(self, vocab_size: int, mask_token_id: int, block_size: int) -> "ModelConfig":
        """This shape for a given tokenizer and block size; an explicit `vocab_size` is kept.

        Raises:
            UserError: when the tokenizer has more ids than the model has embeddings.
        """
        if self.vocab_size is not None and vocab_size > self.vocab_size:
            raise UserError(
                f"model.vocab_size: {self.vocab_size} embeddings, but the data's tokenizer has "
                f"{vocab_size} ids; raise model.vocab_size or prepare the data with its tokenizer"
            )
        return replace(
            self,
            vocab_size=self.vocab_size or vocab_size,
            mask_token_id=mask_token_id,
            block_size=block_size,
        )

    def without_drafting(self) -> "ModelConfig":
        """The same shape for a model that is not trained to draft."""
        return replace(
            self, mask_token_id=None, block_size=None, draft_rank=0, adapter_rank=0,
            adapter_targets=(), own_mask_embedding=False, causal_slots=False, linear_drafts=False,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def load(cls, path: Path) -> "ModelConfig":
        """Read `path`, a JSON file written by `save`; raises UserError naming it when damaged."""
        try:
            values = json.loads(read_text_checked(path))
            known = {item.name for item in fields(cls)}
            return cls(**{name: value for name, value in values.items() if name in known})
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not a model description ({error})") from error

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n")


@dataclass(frozen=True)
class ModelKeys(ModelConfig):
    """The keys of `model`: a whole shape, or what is said of the model at `init_from`."""

    backbone: str = "auto"
    """What runs the layers: auto, compact (ours, the fast path: Qwen2, Qwen3, Llama, Mistral) or
    transformers (its own code)."""
