"""Prepared shards as a list of sequences: `source[n]` is the n-th of the run, ready for a batch."""

import sys
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data_prep.formats.groups import PackedGroup, PackedSequence
from data_prep.formats.manifest import Manifest, Split
from data_prep.formats.shards import ShardReader
from data_prep.layout import LOSS_SPANS, RESPONSE, BlockSizes, Layout, build_layout
from pipeline.data.order import SequenceOrder
from pipeline.data.place import DataConfig, local_shard
from pipeline.data.windows import draw_windows
from pipeline.model.config import block_slots
from tidar_common.errors import UserError

CACHED_GROUPS = 8
OPEN_SHARDS = 4
NO_BLOCKS = Layout(*(np.zeros(0, dtype=np.int32) for _ in range(4)))


@dataclass(frozen=True)
class BlockCurriculum:
    """Shares that move linearly from those of `start` to those of `end`.

    A pure function of the step, and so of a sequence's number in the run: neither a resume nor the
    number of processes changes what a sequence draws.
    """

    start: BlockSizes
    end: BlockSizes
    from_step: int
    ramp_steps: int

    @classmethod
    def checked(
        cls,
        start: BlockSizes | None,
        end_shares: list[float] | None,
        from_step: int,
        ramp_steps: int,
    ) -> "BlockCurriculum | None":
        """From the keys of `curriculum`; None where all sequences have the same K.

        Args:
            start: `layout.block_sizes` with `layout.block_shares`.
            end_shares: `layout.block_shares_end`; None keeps those of `start`.
            from_step: steps before the shares move.
            ramp_steps: steps over which they do.

        Raises:
            UserError: naming the key that is wrong.
        """
        for name, value in (("from_step", from_step), ("ramp_steps", ramp_steps)):
            if value < 0:
                raise UserError(f"layout.block_shares_{name}: must be 0 or more, got {value}")
        if start is None:
            if end_shares:
                raise UserError(
                    "layout.block_shares_end: says how often to draw layout.block_sizes, which has "
                    "no value"
                )
            return None
        end = start
        if end_shares:
            end = start.with_shares(end_shares, "layout.block_shares_end")
        return cls(start, end, from_step, ramp_steps)

    def at(self, step: int) -> BlockSizes:
        """What the sequences of the step after `step` done ones draw from."""
        begun = step - self.from_step
        if begun < 0:
            return self.start
        grown = min(1.0, begun / self.ramp_steps) if self.ramp_steps else 1.0
        pairs = zip(self.start.shares, self.end.shares, strict=True)
        return replace(self.start, shares=tuple((1 - grown) * a + grown * b for a, b in pairs))


@dataclass(frozen=True)
class LayoutChoice:
    """Layouts of a training run; a None takes what the shards were prepared with.

    With a block size, coverage or shift of its own, or linear drafts, a run lays its sequences out
    anew at reading, differently in every epoch, keyed by (seed, epoch, sequence).
    """

    block_size: int | None = None
    """K, the most positions a block drafts; None here and below is as prepared, a value lays out
    anew in each epoch."""
    coverage: float | None = None
    """Share of the positions that have slots, in (0, 1]."""
    shift: bool | None = None
    """Let blocks start anywhere; see tidar-prepare."""
    block_sizes: list[int] | None = None
    """Values of K of which each sequence draws one, such as [4,8,16]."""
    block_shares: list[float] | None = None
    """How often each of them is drawn, such as [1,1,2]; None draws all alike."""
    block_shares_end: list[float] | None = None
    """How often in the end; None keeps block_shares throughout."""
    block_shares_from_step: int = 0
    """Optimizer steps before the shares begin to move."""
    block_shares_ramp_steps: int = 0
    """Optimizer steps over which they then do, linearly."""
    causal_slots: bool = False
    """A mask slot sees only earlier slots of its block; part of the model from then on."""
    linear: bool = False
    """Train for steps with one block for all counts (2K-1 slots); part of the model from then on.
    Needs model.draft_rank."""
    loss_span: str | None = None
    """What is learnt of a document: document, or response, what stands behind its prompt."""

    def __post_init__(self) -> None:
        if self.loss_span not in (None, *LOSS_SPANS):
            raise UserError(
                f"layout.loss_span: {self.loss_span!r} is not {' or '.join(LOSS_SPANS)}"
            )
        if self.block_size is not None and self.block_size < 1:
            raise UserError(f"layout.block_size: must be at least 1, got {self.block_size}")
        if self.coverage is not None and not 0.0 < self.coverage <= 1.0:
            raise UserError(f"layout.coverage: must be in (0, 1], got {self.coverage}")
        self.mixed(self.block_size)

    def mixed(self, largest: int | None) -> BlockCurriculum | None:
        """The choice of block sizes, None where all sequences have the same."""
        return BlockCurriculum.checked(
            BlockSizes.checked(self.block_sizes, self.block_shares, largest),
            self.block_shares_end,
            self.block_shares_from_step,
            self.block_shares_ramp_steps,
        )

    @property
    def stored(self) -> bool:
        changes = (self.block_size, self.coverage, self.shift, self.block_sizes, self.loss_span)
        return not self.linear and all(value is None for value in changes)


@dataclass(frozen=True)
class DamagedShard:
    """A shard that a run goes on without, with `data.skip_damaged`."""

    set: str | None
    """Its set of `data.mix`; None where there is no mix."""
    shard: str
    """As the manifest names it."""
    reason: str
    step: int
    """The first optimizer step of the run's order that its sequences are missing from, from 1."""


class Source(Protocol):
    """What batches are made from: the sequences of a run in its order, from 0 on without end."""

    manifest: Manifest
    """Of the data that says the sequence length and the tokenizer."""

    def __getitem__(self, n: int) -> PackedSequence: ...

    @property
    def block_size(self) -> int:
        """K, the most positions that a block drafts."""

    @property
    def block_slots(self) -> int:
        """Slots of the longest block."""

    @property
    def coverage(self) -> float:
        """Share of the positions that have slots."""

    @property
    def epoch_sequences(self) -> int:
        """Sequences of all the data."""

    def damaged_shards(self) -> list[DamagedShard]:
        """Those left out so far, in the order in which they came up."""


class SequenceSource:
    """The sequences of one split of a prepared data folder, in the run's order."""

    def __init__(
        self,
        data_dir: Path,
        manifest: Manifest,
        split: Split,
        seed: int,
        choice: LayoutChoice | None = None,
        data: DataConfig | None = None,
        sequences_per_step: int = 1,
    ) -> None:
        """`sequences_per_step` of the whole run are what a curriculum of block sizes counts in."""
        self.manifest = manifest
        self.split = split
        self.order = SequenceOrder(
            [shard.sequences for shard in split.shards], manifest.group_size, seed
        )
        self.choice = choice or LayoutChoice()
        self._as_stored = self.choice.stored
        self._mixed = self.choice.mixed(self.block_size)
        if self.choice.loss_span == RESPONSE != manifest.loss_span:
            raise UserError(
                f"layout.loss_span: {data_dir} was prepared without prompts; prepare it with "
                "layout.loss_span=response and corpus.prompt_field"
            )
        self._with_prompts = (self.choice.loss_span or manifest.loss_span) == RESPONSE
        self._sequences_per_step = sequences_per_step
        self._damaged: dict[str, DamagedShard] = {}
        self._data = data or DataConfig()
        self._seed = seed
        self._data_dir = data_dir
        self._first = np.cumsum([0] + [shard.sequences for shard in split.shards])
        self._readers: OrderedDict[int, ShardReader] = OrderedDict()
        self._index: list[NDArray[np.int64]] | None = None
        self._groups: OrderedDict[tuple[int, int], PackedGroup] = OrderedDict()

    def __getitem__(self, n: int) -> PackedSequence:
        """The n-th sequence of the run; see `at_step`."""
        return self.at_step(n, n // self._sequences_per_step)

    def at_step(self, n: int, step: int) -> PackedSequence:
        """The n-th sequence of this data, laid out as in optimizer step `step`.

        Raises:
            UserError: naming a shard that cannot be read, unless `data.skip_damaged` is on: then
                its sequences are all padding, and those of other shards stay where they are.
        """
        place = self.order[n]
        number, inside = divmod(place.index, self.manifest.group_size)
        name = self.split.shards[place.shard].name
        try:
            if name in self._damaged:
                return self._nothing()
            packed = self._group(place.shard, number)[inside]
        except UserError as error:
            if not self._data.skip_damaged:
                raise
            self._damaged[name] = DamagedShard(None, name, str(error), step + 1)
            print(f"{error}; its sequences are left out", file=sys.stderr, flush=True)
            return self._nothing()
        padding = len(packed.tokens) - packed.real_tokens(self.manifest.tokenizer.pad_id)
        prompts = packed.prompt_lengths if self._with_prompts else None
        sequence = replace(packed, prompt_lengths=prompts, padding=padding)
        if self._as_stored:
            return sequence
        key = [self._seed, place.epoch, int(self._first[place.shard]) + place.index]
        return self._lay_out(sequence, step, np.random.default_rng(key))

    @property
    def epoch_sequences(self) -> int:
        return self.order.epoch_sequences

    @property
    def block_size(self) -> int:
        return self.choice.block_size or self.manifest.block_size

    @property
    def block_slots(self) -> int:
        return block_slots(self.block_size, self.choice.linear)

    @property
    def coverage(self) -> float:
        return self.choice.coverage or self.manifest.coverage

    def damaged_shards(self) -> list[DamagedShard]:
        return list(self._damaged.values())

    def _nothing(self) -> PackedSequence:
        """In place of a sequence that cannot be read: padding, which carries no loss."""
        length = self.manifest.sequence_length
        tokens = np.full(length, self.manifest.tokenizer.pad_id, dtype=np.int64)
        return PackedSequence(tokens, np.array([length]), NO_BLOCKS, padding=length)

    def _lay_out(
        self, sequence: PackedSequence, step: int, rng: np.random.Generator
    ) -> PackedSequence:
        shift = self.manifest.shift if self.choice.shift is None else self.choice.shift
        size = self._mixed.at(step).draw(rng) if self._mixed else self.block_size
        linear = self.choice.linear
        layout = build_layout(
            sequence.real_lengths,
            block_slots(size, linear),
            coverage=self.coverage,
            shift=shift,
            rng=rng,
            prompt_lengths=sequence.real_prompts,
        )
        windows = draw_windows(layout, size, rng) if linear else None
        return replace(sequence, layout=layout, windows=windows)

    def _group(self, shard: int, number: int) -> PackedGroup:
        key = (shard, number)
        if key not in self._groups:
            self._groups[key] = self._reader(shard).read_group(number)
            if len(self._groups) > CACHED_GROUPS:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]

    def _reader(self, shard: int) -> ShardReader:
        """The reader of a shard; a few stay open, since batches of one step may straddle two."""
        if shard not in self._readers:
            if self._index is None:
                index = self.manifest.shard_index(self._data_dir)
                train = self.manifest.train.shards
                first = 0 if self.split.shards[0] == train[0] else len(train)
                self._index = index[first : first + len(self.split.shards)]
            info = self.split.shards[shard]
            path = local_shard(self._data_dir, info, self._data.cache_bytes)
            self._readers[shard] = ShardReader(path, self._index[shard])
            if len(self._readers) > OPEN_SHARDS:
                self._readers.popitem(last=False)[1].close()
        self._readers.move_to_end(shard)
        return self._readers[shard]
