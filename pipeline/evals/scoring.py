"""One held-out sequence through the model, and the cross entropy of its labelled tokens.

Letters: S clean tokens, M slots, N labelled rows, E hidden size, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from data_prep.formats.groups import PackedSequence
from pipeline.data.batch import Batch, make_batch
from pipeline.data.windows import stale_layout
from pipeline.model.attention import training_mask
from pipeline.model.draft_head import DraftRows
from pipeline.model.transformer import Transformer

ROWS_AT_ONCE = 1024
"""Rows whose logits exist at the same time: with 150,000 tokens, 0.6 GB of fp32."""


@dataclass(frozen=True)
class Scored:
    """The joint forward of one sequence."""

    hidden: Tensor
    """[S + M, E], input of the LM head."""
    losses: Tensor
    """Cross entropy of each labelled token in nats, fp64 [N] on the CPU: AR first, then slots in
    their order, then drafts of the head alone."""
    batch: Batch
    drafts: DraftRows | None
    """What the draft head adds; None without one, or without a mask section."""

    @property
    def ar_losses(self) -> Tensor:
        return self.losses[: self.batch.ar_labels]

    @property
    def diffusion_losses(self) -> Tensor:
        """One for each drafted position of the layout, in order; empty without a mask section."""
        ar = self.batch.ar_labels
        return self.losses[ar : ar + self.batch.diffusion_labels]


@torch.inference_mode()
def score_sequence(
    model: Transformer, sequence: PackedSequence, block_size: int | None = None, first: int = 0
) -> Scored:
    """Run `sequence` with its layout's mask section, or alone where the model has no mask token.

    The LM head is applied to a few rows at a time, since the logits of a whole sequence with its
    mask section would outgrow the model.

    Args:
        model: in evaluation mode.
        sequence: with blocks of up to K positions, whatever the model.
        block_size: K; None takes the model's.
        first: of a model of linear drafts, by how many tokens slots are stale: each block has the
            slots of a linear one, and drafts its positions from this place on (`stale_layout`).
    """
    mask_token_id = model.config.mask_token_id
    if model.config.linear_drafts:
        size = block_size or model.config.block_size or 1
        lengths = sequence.real_lengths
        layout, windows = stale_layout(sequence.layout, lengths, size, first)
        sequence = replace(sequence, layout=layout, windows=windows)
    # Room for all positions, whatever the padding: one shape of attention for all sequences, whose
    # compiled kernel is compiled once. Linear blocks overlap, and may need more.
    num_slots = 0
    if mask_token_id is not None and sequence.layout.num_slots:
        length = len(sequence.tokens)
        num_slots = -(-sequence.layout.num_slots // length) * length
    device = next(model.parameters()).device
    drafting = model.draft_head is not None and num_slots > 0
    batch = make_batch(
        [sequence],
        mask_token_id or 0,
        num_slots,
        # Every block is drafted by the head alone as well, to see what these are worth.
        alone_share=float(drafting),
        causal_slots=model.config.causal_slots,
    )
    mask, clean = training_mask(batch.spans, device), batch.spans.clean_tokens
    batch = batch.to(device)
    hidden = model.hidden(batch.input_ids, batch.position_ids, mask, clean=clean)[0]
    drafts = model.drafts(hidden, batch.blocks) if drafting else None
    losses = []
    for part in pieces(len(batch.rows)):
        logits = row_logits(model, hidden, drafts, batch.rows[part])
        losses.append(F.cross_entropy(logits.float(), batch.labels[part], reduction="none"))
    joined = torch.cat(losses) if losses else torch.zeros(0)
    return Scored(hidden, joined.double().cpu(), batch, drafts)


def row_logits(
    model: Transformer, hidden: Tensor, drafts: DraftRows | None, rows: Tensor
) -> Tensor:
    """Logits [n, V] of some rows [n] of a joint forward, with what a draft head adds."""
    if drafts is None:
        return model.lm_head(hidden[rows])
    return model.draft_logits(drafts, rows)


def pieces(count: int, size: int = ROWS_AT_ONCE) -> Iterator[slice]:
    """Slices of at most `size` that together cover `0 … count - 1`."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
