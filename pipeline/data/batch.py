"""Packed sequences as the tensors of one joint forward, and the batches of this rank's share of a
global batch, read ahead by a thread. Letters: B sequences, S clean, M slots.
"""

import hashlib
import math
import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_prep.formats.groups import PackedSequence
from data_prep.layout import Layout
from pipeline.data.order import numbers_after
from pipeline.data.source import NO_BLOCKS, Source
from pipeline.model.draft_head import BlockRows
from pipeline.model.mask import Spans, layout_spans

SLOT_MULTIPLE = 64
"""Mask sections are padded to a multiple of this, so that batches come in few shapes."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch: the clean sections and, unless the objective is `ar`, the mask sections."""

    input_ids: Tensor
    """int64 [B, S + M]"""
    position_ids: Tensor
    """int64 [B, S + M]: distance from the sequence's start; a slot has its predicted token's."""
    spans: Spans
    """The attention rule, int32 [B, S + M] each."""
    rows: Tensor
    """int64 [N]: the labelled rows among B · (S + M), those of the AR loss first, then slots; and
    behind them the rows of blocks that are drafted by the head alone (`BlockRows.alone`)."""
    labels: Tensor
    """int64 [N]"""
    ar_labels: int
    """How many of the N rows belong to the AR loss."""
    alone_labels: int
    """How many belong to drafts of the head alone; what lies between is the diffusion loss's."""
    clean_tokens: int
    """Tokens of the clean sections without padding."""
    slots: int
    """Mask slots of all blocks, labelled or not."""
    attention_pairs: int
    """Pairs of query and key that the rule allows, padding and spare slots left out."""
    digests: bytes
    """32 bytes a sequence (SHA-256 of its tokens and document lengths), concatenated."""
    blocks: BlockRows

    @property
    def diffusion_labels(self) -> int:
        return len(self.labels) - self.ar_labels - self.alone_labels

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on `device`; nothing is copied where they are there."""
        if device.type == "cpu":
            return self
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("input_ids", "position_ids", "rows", "labels")
        }
        return replace(
            self,
            spans=self.spans.to(device, non_blocking=True),
            blocks=self.blocks.to(device, non_blocking=True),
            **moved,
        )


def section_length(sequence_length: int, coverage: float, block_slots: int) -> int:
    """M for a batch: room for `coverage` of the positions, and for a block of `block_slots` in any
    case, rounded up to `SLOT_MULTIPLE`."""
    slots = max(math.ceil(sequence_length * coverage), block_slots)
    if slots >= sequence_length:
        return sequence_length
    return min(sequence_length, math.ceil(slots / SLOT_MULTIPLE) * SLOT_MULTIPLE)


def make_batch(
    sequences: Sequence[PackedSequence],
    mask_token_id: int,
    num_slots: int,
    *,
    alone_share: float = 0.0,
    causal_slots: bool = False,
) -> Batch:
    """Put `sequences` into one batch with `num_slots` slots each; 0 leaves out the mask section.
    `causal_slots` is that of the model.

    `alone_share` of the blocks that have text before them are drafted by the head alone as well;
    which ones is a pure function of the sequence.

    Labels: a clean position predicts the next token of its document, a slot in its block's window
    the token at its own position; padding and the last token of a document predict nothing, and
    tokens of a prompt are predicted by nothing.
    """
    length = len(sequences[0].tokens)
    width = length + num_slots
    layouts = [sequence.layout if num_slots else NO_BLOCKS for sequence in sequences]
    input_ids, position_ids, spans = _sections(sequences, layouts, mask_token_id, num_slots)
    ar_rows, ar_labels, slot_rows, slot_labels = [], [], [], []
    blocks = []
    pairs = slots = 0
    for number, (sequence, layout) in enumerate(zip(sequences, layouts, strict=True)):
        windows = sequence.drafted if num_slots else layout.drafted
        tokens, first = input_ids[number, :length], number * width
        pairs += allowed_pairs(sequence.real_lengths, layout, causal_slots)
        predicting = positions_that_predict(sequence.real_lengths, sequence.real_prompts)
        ar_rows.append(first + predicting)
        ar_labels.append(tokens[predicting + 1])
        rows = _block_rows(tokens, layout, windows, first)
        drafted = rows[0][rows[0] >= 0]
        slot_rows.append(drafted)
        slot_labels.append(tokens[layout.slot_position[drafted - first - length]])
        blocks.append(rows)
        slots += layout.num_slots
    digests = list(map(sequence_digest, sequences))
    drawn = [
        _draw_alone(rows, digest, alone_share) for rows, digest in zip(blocks, digests, strict=True)
    ]
    joined = _joined(blocks, drawn)
    labels = np.concatenate(slot_labels)
    alone_rows, alone_labels = _alone_rows(joined, labels, input_ids.size)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        spans=Spans(*(torch.from_numpy(part) for part in spans), causal_slots=causal_slots),
        rows=torch.from_numpy(np.concatenate([*ar_rows, *slot_rows, alone_rows])),
        labels=torch.from_numpy(np.concatenate([*ar_labels, labels, alone_labels])),
        ar_labels=sum(map(len, ar_labels)),
        alone_labels=len(alone_labels),
        clean_tokens=sum(int(sequence.real_lengths.sum()) for sequence in sequences),
        slots=slots,
        attention_pairs=pairs,
        digests=b"".join(digests),
        blocks=joined,
    )


def _sections(
    sequences: Sequence[PackedSequence],
    layouts: Sequence[Layout],
    mask_token_id: int,
    num_slots: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
    """Clean and mask sections side by side: ids and positions, [B, S + M], and the attention rule,
    [3, B, S + M]."""
    length = len(sequences[0].tokens)
    shape = len(sequences), length + num_slots
    input_ids = np.full(shape, mask_token_id, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    spans = np.empty((3, *shape), dtype=np.int32)
    for number, (sequence, layout) in enumerate(zip(sequences, layouts, strict=True)):
        input_ids[number, :length] = sequence.tokens
        position_ids[number, :length] = np.arange(length)
        position_ids[number, length : length + layout.num_slots] = layout.slot_position
        spans[:, number] = layout_spans(sequence.document_lengths, layout, num_slots)
    return input_ids, position_ids, spans


RowsOfBlocks = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
"""`slots`, `starts` and `before` of `BlockRows`."""


def _block_rows(
    tokens: NDArray[np.int64], layout: Layout, windows: NDArray[np.int64], first: int
) -> RowsOfBlocks:
    """Of one sequence, whose clean section begins at row `first`; places are those of a block's
    window. A block with an empty one has no place and no start."""
    start, end = windows
    place = np.arange((end - start).max(initial=0))
    there = place < (end - start)[:, None]
    slot = layout.slot_start + start - layout.prefix_end
    slots = first + len(tokens) + slot[:, None] + place
    last = start - 1
    has_text = (start > layout.prefix_start) & (end > start)
    before = tokens[np.clip(last[:, None] + place, 0, len(tokens) - 1)]
    known = there & (has_text[:, None] | (place > 0))
    return (
        np.where(there, slots, -1),
        np.where(has_text, first + last, -1),
        np.where(known, before, 0),
    )


def _draw_alone(blocks: RowsOfBlocks, digest: bytes, share: float) -> NDArray[np.int64]:
    """Which blocks of a sequence are drafted by the head alone, by number; keyed by its digest."""
    able = np.flatnonzero(blocks[1] >= 0)
    if share == 0.0 or len(able) == 0:
        return able[:0]
    rng = np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))
    count = int(share * len(able) + rng.random())  # the share on average
    return np.sort(rng.permutation(able)[:count])


def _joined(parts: list[RowsOfBlocks], alone: list[NDArray[np.int64]]) -> BlockRows:
    """The blocks of all sequences one below the other, filled up to the longest."""
    longest = max(slots.shape[1] for slots, _, _ in parts)

    def filled(x: NDArray[np.int64], value: int) -> NDArray[np.int64]:
        missing = longest - x.shape[1]
        return np.pad(x, ((0, 0), (0, missing)), constant_values=value)

    slots = np.concatenate([filled(part, -1) for part, _, _ in parts])
    starts = np.concatenate([part for _, part, _ in parts])
    before = np.concatenate([filled(part, 0) for _, _, part in parts])
    counts = [len(part) for _, part, _ in parts]
    firsts = np.cumsum(counts) - counts
    chosen = np.concatenate([part + first for part, first in zip(alone, firsts, strict=True)])
    return BlockRows(*(torch.from_numpy(x) for x in (slots, starts, before, chosen)))


def _alone_rows(
    blocks: BlockRows, drafted: NDArray[np.int64], rows: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and labels of the drafts of the head alone, behind `rows` others; `drafted` are the
    labels of the slots. There is none at place 0, which decoding has drawn before it drafts."""
    there = blocks.there.numpy()
    labels = np.zeros(there.shape, dtype=np.int64)
    labels[there] = drafted
    chosen = blocks.alone.numpy()
    drafts = there[chosen]
    drafts[:, :1] = False
    number = rows + np.arange(drafts.size).reshape(drafts.shape)
    return number[drafts], labels[chosen][drafts]


def allowed_pairs(
    document_lengths: NDArray[np.integer], layout: Layout, causal_slots: bool = False
) -> int:
    """Pairs of query and key that the attention rule allows over these documents and blocks."""
    lengths = document_lengths.astype(np.int64)
    drafted = layout.draft_lengths.astype(np.int64)
    prefix = layout.prefix_end - layout.prefix_start
    inside = drafted * (drafted + 1) // 2 if causal_slots else drafted**2
    return int((lengths * (lengths + 1) // 2).sum() + (drafted * prefix + inside).sum())


def positions_that_predict(
    document_lengths: NDArray[np.integer], prompt_lengths: NDArray[np.integer]
) -> NDArray[np.int64]:
    """The positions whose next token is of their own document and not of its prompt: of a document
    without a prompt all but the last. A prompt's last position predicts what stands behind it."""
    ends = np.cumsum(document_lengths)
    total = int(ends[-1]) if len(ends) else 0
    predicts = np.ones(total, dtype=bool)
    predicts[ends - 1] = False
    if prompt_lengths.any():
        offset = np.arange(total) - np.repeat(ends - document_lengths, document_lengths)
        predicts &= offset + 1 >= np.repeat(prompt_lengths, document_lengths)
    return np.flatnonzero(predicts)


def sequence_digest(sequence: PackedSequence) -> bytes:
    """SHA-256 of a sequence's tokens, document lengths and prompts if it has any, whatever types
    they are stored in."""
    digest = hashlib.sha256(sequence.tokens.astype("<u4").tobytes())
    digest.update(sequence.document_lengths.astype("<u4").tobytes())
    if sequence.prompt_lengths is not None:
        digest.update(sequence.prompt_lengths.astype("<u4").tobytes())
    return digest.digest()


READ_AHEAD_STEPS = 2


@dataclass(frozen=True)
class Share:
    """How a global batch is divided: rank r of `world_size` takes, in each of
    `accumulation_steps` rounds, the r-th run of `micro_batch_size` sequences."""

    micro_batch_size: int
    accumulation_steps: int
    rank: int
    world_size: int

    @property
    def global_batch_size(self) -> int:
        """Sequences in an optimizer step."""
        return self.micro_batch_size * self.accumulation_steps * self.world_size

    def numbers(
        self, sequences_seen: int, left_out: Sequence[tuple[int, int]] = ()
    ) -> list[list[int]]:
        """Order numbers of the sequences of each round of the step after `sequences_seen`."""
        step = numbers_after(sequences_seen, self.global_batch_size, left_out)
        size = self.micro_batch_size
        starts = (
            (number * self.world_size + self.rank) * size
            for number in range(self.accumulation_steps)
        )
        return [step[start : start + size] for start in starts]


def step_batches(
    source: Source,
    share: Share,
    sequences_seen: int,
    *,
    with_slots: bool,
    alone_share: float = 0.0,
    causal_slots: bool = False,
    left_out: Sequence[tuple[int, int]] = (),
) -> Generator[list[Batch]]:
    """Yield, without end, the micro-batches of one optimizer step after another.

    A thread reads ahead; what goes wrong there is raised here. Close the generator to end it.
    Sequences whose order numbers lie in the ranges `left_out` never come; the order of all others
    stays. `alone_share` of the blocks are drafted by the head alone as well (`make_batch`);
    `causal_slots` is that of the model.
    """
    length = source.manifest.sequence_length
    slots = section_length(length, source.coverage, source.block_slots) if with_slots else 0
    mask_token_id = source.manifest.tokenizer.mask_id

    def read() -> Iterator[list[Batch]]:
        seen = sequences_seen
        while True:
            yield [
                make_batch(
                    [source[n] for n in numbers],
                    mask_token_id,
                    slots,
                    alone_share=alone_share,
                    causal_slots=causal_slots,
                )
                for numbers in share.numbers(seen, left_out)
            ]
            seen = numbers_after(seen, share.global_batch_size, left_out)[-1] + 1

    return ahead(read(), READ_AHEAD_STEPS)


def ahead(batches: Iterator[list[Batch]], depth: int) -> Generator[list[Batch]]:
    """`batches`, produced by a thread that stays up to `depth` items ahead."""
    ready: queue.Queue[list[Batch] | BaseException] = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: list[Batch] | BaseException) -> None:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.2)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in batches:
                put(item)
                if stopped.is_set():
                    return
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=work, name="tidar-read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()  # a daemon thread that is cut off by the interpreter's end can abort it
