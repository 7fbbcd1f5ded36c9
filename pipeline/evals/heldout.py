"""Held-out text as evals need it: whole documents to continue, packed sequences to score."""

from pathlib import Path

import numpy as np

from data_prep.errors import UserError
from data_prep.manifest import Manifest
from pipeline.data.source import LayoutChoice, Sequence, SequenceSource


class HeldOut:
    """The held-out split of a prepared data folder."""

    def __init__(self, data_dir: Path, manifest: Manifest) -> None:
        if manifest.heldout.sequences == 0:
            raise UserError(f"{data_dir}: has no held-out sequences; raise heldout_fraction")
        self.manifest = manifest
        self._data_dir = data_dir

    def sequences(self, count: int, seed: int, block_size: int) -> list[Sequence]:
        """Up to `count` different packed sequences, laid out with full coverage.

        The grid is shifted, since the decoder, too, starts its blocks anywhere.
        """
        choice = LayoutChoice(block_size=block_size, coverage=1.0, shift=True)
        source = SequenceSource(self._data_dir, self.manifest, self.manifest.heldout, seed, choice)
        return [source[n] for n in range(min(count, self.manifest.heldout.sequences))]

    def prompts(self, count: int, prompt_tokens: int, seed: int) -> list[list[int]]:
        """The first `prompt_tokens` tokens of up to `count` different documents.

        Only documents longer than the prompt are taken, so that there is something to continue.

        Raises:
            UserError: when no held-out document is long enough.
        """
        source = SequenceSource(self._data_dir, self.manifest, self.manifest.heldout, seed)
        prompts: list[list[int]] = []
        for n in range(self.manifest.heldout.sequences):
            sequence = source[n]
            ends = np.cumsum(sequence.real_lengths)
            for end, length in zip(ends, sequence.real_lengths, strict=True):
                if length > prompt_tokens and len(prompts) < count:
                    start = int(end - length)
                    prompts.append(sequence.tokens[start : start + prompt_tokens].tolist())
            if len(prompts) == count:
                break
        if not prompts:
            raise UserError(
                f"evals.decode_speed.prompt_tokens: no held-out document has more than "
                f"{prompt_tokens} tokens; choose a smaller number"
            )
        return prompts

    def unigram(self) -> "Unigram":
        counts = self.manifest.token_counts(self._data_dir)
        return Unigram.from_counts(counts)


class Unigram:
    """The context-free baseline: token frequencies of the training split, smoothed by one count."""

    def __init__(self, probabilities: np.ndarray, entropy: float) -> None:
        self.probabilities = probabilities
        """fp64 [V]"""
        self.entropy = entropy
        """Of the unsmoothed frequencies, in nats."""

    @classmethod
    def from_counts(cls, counts: np.ndarray) -> "Unigram":
        frequencies = counts[counts > 0] / counts.sum()
        entropy = float(-(frequencies * np.log(frequencies)).sum())
        smoothed = counts.astype(np.float64) + 1.0
        return cls(smoothed / smoothed.sum(), entropy)
