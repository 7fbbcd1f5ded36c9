"""Floating point operations of an optimizer step; a multiply-add counts as two.

Model FLOPs, in the sense of MFU: what forward and backward execute, without what activation
checkpointing computes again (PaLM, arXiv 2204.02311, appendix B).
"""

from dataclasses import dataclass

from data_prep.layout import build_layout
from pipeline.model.config import ModelConfig


@dataclass(frozen=True)
class StepFlops:
    """Of one optimizer step over all processes."""

    weights: int
    """6 for each weight and row that meet in a matrix product."""
    attention: int
    """Scores and mixing over the pairs of query and key that the rule allows."""
    recomputed: int
    """Forward work that checkpointing repeats; not part of `model`."""

    @property
    def model(self) -> int:
        return self.weights + self.attention


def allowed_pairs(
    sequence_length: int, block_slots: int, coverage: float | None, causal_slots: bool = False
) -> int:
    """Pairs of query and key that the rule allows in a sequence of one document.

    Several documents allow fewer. Blocks have `block_slots` slots; `coverage` None has no mask
    section.
    """
    clean = sequence_length * (sequence_length + 1) // 2
    if coverage is None:
        return clean
    layout = build_layout([sequence_length], block_slots, coverage=coverage)
    drafted = layout.draft_lengths.astype(int)
    inside = drafted * (drafted + 1) // 2 if causal_slots else drafted**2
    return clean + int((drafted * layout.prefix_end + inside).sum())


def step_flops(
    config: ModelConfig,
    *,
    sequences: int,
    rows: int,
    pairs: int,
    labelled: int | None = None,
    checkpointing: str = "none",
    teacher_rows: int = 0,
    slots: int = 0,
    drafted: int | None = None,
    alone: int = 0,
    frozen: bool = False,
    measured: int = 1,
) -> StepFlops:
    """FLOPs of a step.

    Args:
        config: the model's shape.
        sequences: how many there are.
        rows: of each, both sections together.
        pairs: of query and key that meet in attention in each.
        labelled: rows of each that go through the LM head; None takes all.
        checkpointing: `full` computes layers again; `selective` repeats no matrix product.
        teacher_rows: rows of each that go through the head once more, forward only.
        slots: how many of the rows are mask slots: adapters work on them.
        drafted: places that they draft, where a draft head works; None takes all slots.
        alone: places of each that are drafted by the head alone as well; they are among `labelled`.
        frozen: only what drafts learns: clean rows go forward only, and through no weight of the
            base goes a gradient but that of activations. Attention's backward is taken by the share
            of slots among the rows.
        measured: of the AR rows that do not count then, one in so many goes through the LM head.
    """
    head = config.num_embeddings * (config.hidden_size + config.draft_rank)
    width = config.num_heads * config.head_dim
    projections = 2 * width + 2 * config.num_kv_heads * config.head_dim
    last = config.intermediate_size * config.hidden_size
    layers = config.num_layers * (config.hidden_size * projections + 3 * last)
    places = slots if drafted is None else drafted
    heads = sequences * (rows + alone if labelled is None else labelled)
    forward_layers, forward_head = 2 * layers * sequences * rows, 2 * head * heads
    forward_attention = 4 * config.num_layers * width * sequences * pairs
    adapters = config.num_layers * config.adapter_elements * slots
    drafting = 2 * sequences * (adapters + config.num_cell_products * (places + alone))
    # A layer is computed again up to its last product, whose result nothing needs.
    last_products = 2 * config.num_layers * last * sequences * rows
    repeated = forward_layers - last_products + forward_attention
    weights, attention = 3 * (forward_layers + forward_head), 3 * forward_attention
    if frozen:
        share, drafts = slots / max(rows, 1), sequences * (places + alone)
        learned = 2 * config.num_embeddings * config.draft_rank * drafts
        weights = forward_layers + round(share * forward_layers)
        weights += 2 * head * ((heads - drafts) // measured + 2 * drafts) + learned
        attention = forward_attention + round(2 * share * forward_attention)
        repeated = round(share * repeated)
    return StepFlops(
        weights=weights + 3 * drafting + 2 * head * sequences * teacher_rows,
        attention=attention,
        recomputed=repeated if checkpointing == "full" else 0,
    )
