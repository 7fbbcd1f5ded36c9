"""Held-out text as evals need it: whole documents to continue, packed sequences to score."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.formats.groups import PackedSequence
from data_prep.formats.manifest import Manifest
from data_prep.tokenizers.load import Tokenizer, load_tokenizer
from pipeline.data.mix import MixedSet
from pipeline.data.source import LayoutChoice, SequenceSource
from pipeline.decoding.prompts import read_prompts
from pipeline.distributed import World
from pipeline.evals.pairs import pair_counts
from pipeline.evals.settings import DecodeSpeedConfig
from pipeline.objective.controls import Controls
from tidar_common.errors import UserError


class HeldOut:
    """The held-out split of a prepared data folder, and those of the sets of a `data.mix`."""

    def __init__(self, data_dir: Path, manifest: Manifest, mix: Sequence[MixedSet] = ()) -> None:
        """`mix` are the sets that the model was trained on together, if there were several.

        Raises:
            UserError: when the folder, or that of a set, has no held-out split.
        """
        if manifest.heldout.sequences == 0:
            raise UserError(f"{data_dir}: has no held-out sequences; raise heldout_fraction")
        self.manifest = manifest
        self._data_dir = data_dir
        self._mix = {one.name: HeldOut(one.dir, one.manifest) for one in mix}

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
            found = self.prompts(config.prompts, config.prompt_tokens, config.seed)
            return found, [None] * len(found)
        tokenizer = self.tokenizer
        rows = read_prompts(Path(config.prompts_file).expanduser(), "evals.decode_speed")
        prompts, categories = [], []
        for row in rows[: config.prompts]:
            tokens = tokenizer.encode(row.prompt)[: config.prompt_tokens]
            prompts.append(tokens or [tokenizer.eos_id])
            categories.append(row.category)
        return prompts, categories

    def controls(self, world: World, drafts: bool = True) -> Controls:
        """The drafts of no model, from the training split; all ranks call it together.

        `drafts`: whether a model's own will stand beside them; without, no pairs are counted.
        """
        unigram = torch.from_numpy(self.unigram().probabilities)
        if not drafts:
            return Controls(unigram)
        # One rank reads the shards, so that all have the same table whatever their disks hold.
        own = pair_counts(self._data_dir, self.manifest) if world.is_main else None
        return Controls(unigram, world.from_main(own))

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
