"""Held-out text as evals need it: whole documents to continue, packed sequences to score."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.formats.groups import PackedSequence
from data_prep.formats.manifest import Manifest
from data_prep.formats.shards import ShardReader
from data_prep.tokenizers.load import Tokenizer, load_tokenizer
from pipeline.data.mix import MixedSet
from pipeline.data.place import check_shards, local_shard
from pipeline.data.source import LayoutChoice, SequenceSource
from pipeline.decoding.prompts import read_prompts
from pipeline.distributed import World
from pipeline.evals.acceptance import Controls, PairCounts
from pipeline.evals.config import DecodeSpeedConfig
from tidar_common.errors import UserError

PAIR_TOKENS = 4_000_000
"""Tokens of the training split whose pairs are counted, at most."""
PAIR_SHARDS = 16
"""Shards that they come from, at most: those of a remote folder are copied whole."""
_COUNTED: dict[str, PairCounts | None] = {}
"""By the data's fingerprint: a run's evals count once."""


class HeldOut:
    """The held-out split of a prepared data folder, and those of the sets of a `data.mix`."""

    def __init__(
        self,
        data_dir: Path,
        manifest: Manifest,
        mix: Sequence[MixedSet] = (),
        key: str = "data.dir",
    ) -> None:
        """`mix` are the sets that the model was trained on together, if there were several; `key`
        says where the folder stands in the config.

        Raises:
            UserError: when the folder, or that of a set, has no held-out split, or not all of it.
        """
        if manifest.heldout.sequences == 0:
            raise UserError(
                f"{key}: nothing of {data_dir} is held out; prepare it with a heldout_fraction or "
                "a heldout_path, or train without evals (evals.decode_speed.every=0)"
            )
        check_shards(data_dir, manifest.heldout.shards, key)
        self.manifest = manifest
        self._data_dir = data_dir
        self._mix = {
            part.name: HeldOut(part.dir, part.manifest, key=f"data.mix.{part.name}.dir")
            for part in mix
        }

    def by_source(self) -> dict[str, "HeldOut"]:
        """The held-out split of each set of the mix by its name, in the order of the names; empty
        where there is no mix.

        `sequences` of each takes the same arguments as here. A set may be this folder itself.
        """
        return {name: self._mix[name] for name in sorted(self._mix)}

    @property
    def tokenizer(self) -> Tokenizer:
        """That of the data, and of any model evaluated on it."""
        return load_tokenizer(self._data_dir)

    def sequences(
        self,
        count: int | None,
        seed: int,
        block_size: int,
        *,
        shift: bool,
        loss_span: str | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[PackedSequence]:
        """This rank's share of `count` different packed sequences, laid out with full coverage.

        The shares of all ranks together are the same sequences, with the same layouts, for any
        number of ranks.

        Args:
            count: sequences of all ranks together; None, or more than there are, takes all.
            seed: of their choice and of the shifts.
            block_size: K.
            shift: move each document's grid by a random 0 … K-1 positions, as decoding starts its
                blocks anywhere; without it every grid starts at its document's start.
            loss_span: `document` for prompts as well; None takes what the data was prepared with.
            rank: this rank.
            world_size: how many there are.
        """
        choice = LayoutChoice(block_size=block_size, coverage=1.0, shift=shift, loss_span=loss_span)
        source = SequenceSource(self._data_dir, self.manifest, self.manifest.heldout, seed, choice)
        total = self.manifest.heldout.sequences
        for n in range(rank, total if count is None else min(count, total), world_size):
            yield source[n]

    def prompts(self, count: int, prompt_tokens: int, seed: int) -> list[list[int]]:
        """The first `prompt_tokens` tokens of up to `count` different documents.

        Only documents longer than the prompt are taken, so that there is something to continue.
        A document longer than a sequence was cut when it was packed; its pieces count as documents.

        Raises:
            UserError: when no held-out document is long enough.
        """
        source = SequenceSource(self._data_dir, self.manifest, self.manifest.heldout, seed)
        prompts: list[list[int]] = []
        for n in range(self.manifest.heldout.sequences):
            for document in documents(source[n]):
                if len(document) > prompt_tokens and len(prompts) < count:
                    prompts.append(document[:prompt_tokens].tolist())
            if len(prompts) == count:
                break
        if not prompts:
            raise UserError(
                f"evals.decode_speed.prompt_tokens: no held-out document has more than "
                f"{prompt_tokens} tokens; choose a smaller number"
            )
        return prompts

    def prompts_for(self, config: DecodeSpeedConfig) -> tuple[list[list[int]], list[str | None]]:
        """The prompts of a decode-speed eval and their categories (None for held-out documents).

        Raises:
            UserError: when no document is long enough, or `prompts_file` holds something else.
        """
        if config.prompts_file is None:
            prompts = self.prompts(config.prompts, config.prompt_tokens, config.seed)
            return prompts, [None] * len(prompts)
        tokenizer = self.tokenizer
        rows = read_prompts(Path(config.prompts_file).expanduser(), "evals.decode_speed")
        rows = rows[: config.prompts]
        texts = [tokenizer.encode(row.prompt)[: config.prompt_tokens] for row in rows]
        return [text or [tokenizer.eos_id] for text in texts], [row.category for row in rows]

    def shortages(self, config: DecodeSpeedConfig) -> list[str]:
        """A line for each thing that the eval has less of than `config` asks for, with its key."""
        prompts, sequences = len(self.prompts_for(config)[0]), self.manifest.heldout.sequences
        more = "prepare more, or with a larger heldout_fraction"
        lines = []
        if prompts < config.prompts:
            what = f"held-out documents of more than {config.prompt_tokens} tokens"
            remedy = f"{more}, or lower prompt_tokens or this"
            if config.prompts_file is not None:
                what, remedy = f"prompts in {config.prompts_file}", "lower this"
            lines.append(
                f"evals.decode_speed.prompts: {config.prompts} asked for, but there are only "
                f"{prompts} {what}, which all evals take; {remedy}"
            )
        if sequences < config.score_sequences:
            lines.append(
                f"evals.decode_speed.score_sequences: {config.score_sequences} asked for, but "
                f"{self._data_dir} has only {sequences} held-out sequences, which all evals take; "
                f"{more}, or lower this"
            )
        return lines

    def controls(self, world: World, drafts: bool = True) -> Controls:
        """The drafts of no model, from the training split; all ranks call it together.

        `drafts`: whether a model's own will stand beside them; without, no pairs are counted.
        """
        unigram = torch.from_numpy(self.unigram().probabilities)
        if not drafts:
            return Controls(unigram)
        # One rank reads the shards, so that all have the same table whatever their disks hold.
        pairs = pair_counts(self._data_dir, self.manifest) if world.is_main else None
        return Controls(unigram, world.from_main(pairs))

    def unigram(self) -> "Unigram":
        return Unigram.from_counts(self.manifest.token_counts(self._data_dir))


@dataclass(frozen=True)
class Unigram:
    """The context-free baseline: token frequencies of the training split, smoothed by one count."""

    probabilities: NDArray[np.float64]
    """fp64 [V]"""
    entropy: float
    """Of the unsmoothed frequencies, in nats."""

    @classmethod
    def from_counts(cls, counts: NDArray[np.int64]) -> "Unigram":
        frequencies = counts[counts > 0] / counts.sum()
        entropy = float(-(frequencies * np.log(frequencies)).sum())
        smoothed = counts.astype(np.float64) + 1.0
        return cls(smoothed / smoothed.sum(), entropy)


def documents(sequence: PackedSequence) -> list[NDArray[np.integer]]:
    """The tokens of each document of a packed sequence, end tokens included, padding left out."""
    ends = np.cumsum(sequence.real_lengths)
    return [
        sequence.tokens[end - length : end]
        for end, length in zip(ends, sequence.real_lengths, strict=True)
    ]


def pair_counts(data_dir: Path, manifest: Manifest) -> PairCounts | None:
    """How often each token follows which in the train split, within documents.

    A part of a large split is counted, the same each time: whole groups spread evenly over it, or
    the first sequences of groups that are larger than their share.

    Returns:
        PairCounts: None where no shard of the split can be read; those that cannot are left out,
            with a line on stderr.
    """
    key = manifest.fingerprint()
    if key not in _COUNTED:
        keys = [_pair_keys(group, manifest) for group in _groups(data_dir, manifest)]
        _COUNTED[key] = None
        if keys:
            joined = torch.from_numpy(np.concatenate(keys))
            _COUNTED[key] = PairCounts.from_keys(joined, manifest.tokenizer.vocab_size)
    return _COUNTED[key]


def _pair_keys(group: Sequence[PackedSequence], manifest: Manifest) -> NDArray[np.int64]:
    """`u · vocab_size + v` of each pair (u, v) that stands in a document of `group`."""
    keys = []
    for packed in group:
        real = packed.real_tokens(manifest.tokenizer.pad_id)
        tokens = packed.tokens[:real].astype(np.int64)
        inside = np.ones(max(real - 1, 0), dtype=bool)
        last = np.cumsum(packed.document_lengths) - 1
        inside[last[last < len(inside)]] = False
        keys.append((tokens[:-1] * manifest.tokenizer.vocab_size + tokens[1:])[inside])
    return np.concatenate(keys)


def _groups(data_dir: Path, manifest: Manifest) -> Iterator[Sequence[PackedSequence]]:
    """The sequences that are counted, group by group."""
    shards = manifest.train.shards
    places = [
        (shard, number)
        for shard in _spread(len(shards), PAIR_SHARDS)
        for number in range(manifest.groups(shards[shard]))
    ]
    size = manifest.group_size * manifest.sequence_length
    chosen = [places[n] for n in _spread(len(places), max(PAIR_TOKENS // size, 1))]
    rows = max(PAIR_TOKENS // max(len(chosen), 1) // manifest.sequence_length, 1)
    index = manifest.shard_index(data_dir)
    for shard in dict.fromkeys(shard for shard, _ in chosen):
        try:
            reader = ShardReader(local_shard(data_dir, shards[shard]), index[shard])
            for number in (n for place, n in chosen if place == shard):
                yield reader.read_group(number)[:rows]
        except UserError as error:
            print(f"{error}; its token pairs are not counted", file=sys.stderr, flush=True)


def _spread(total: int, wanted: int) -> list[int]:
    """Up to `wanted` of the numbers `0 … total - 1`, as evenly as can be."""
    count = min(total, wanted)
    return [number * total // count for number in range(count)]
