"""Several corpora as one: a mix, each with a share of the tokens, or text and what is held out."""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from data_prep.corpora.base import DEFAULT_PART_BYTES, Corpus, Counts, Document, Part
from tidar_common.errors import UserError

SAMPLED_PART_BYTES = 100_000
SAMPLED_PARTS = 8


@dataclass(frozen=True)
class MixConfig:
    sources: dict[str, Any] | None = None
    """By name: a weight, and the keys of a corpus, its kind among them. Weights need not add up to
    1:
    'corpus.sources={web:{kind:jsonl,path:web/,weight:0.7},code:{kind:parquet,path:code/,weight:0.3}}'."""
    kind: str = "mix"
    """Which reader."""
    max_epochs: float = 4.0
    """A source that would be read more often than this to have its share is an error."""

    def __post_init__(self) -> None:
        if self.sources is None or len(self.sources) < 2:
            raise UserError("corpus.sources: needs two corpora or more; for one use it directly")


@dataclass(frozen=True)
class Source:
    """One corpus of a mix."""

    corpus: Corpus
    weight: float
    """Its share of the tokens; weights need not add up to 1."""


class MixCorpus(Corpus):
    """The source that lasts longest at these weights is read once, so that nothing is left out;
    the others as often as their shares ask for, in whole epochs and a part of one."""

    def __init__(self, sources: dict[str, Source], max_epochs: float) -> None:
        self.sources = sources
        self.max_epochs = max_epochs
        self._tokens_per_byte: dict[str, float] = {}

    @property
    def has_prompts(self) -> bool:
        return any(source.corpus.has_prompts for source in self.sources.values())

    @property
    def total_bytes(self) -> int:
        wanted = self.wanted_epochs()
        return sum(int(wanted[n] * source.corpus.total_bytes) for n, source in self.sources.items())

    def listing(self) -> list[tuple[str, int]]:
        return [
            (f"{name}: {file}", size)
            for name, source in self.sources.items()
            for file, size in source.corpus.listing()
        ]

    def weigh(self, count_tokens: Counts) -> None:
        """Measure how many tokens a byte of each source gives, on some of its text."""
        for name, source in self.sources.items():
            parts = source.corpus.parts(SAMPLED_PART_BYTES)
            tokens = size = 0
            for part in parts[:: max(len(parts) // SAMPLED_PARTS, 1)]:
                texts, length = [], 0
                for document in source.corpus.documents([part]):
                    texts.append(document.whole)
                    length += len(document.whole.encode())
                    if length > 2 * SAMPLED_PART_BYTES:
                        break  # a file that cannot be divided; what is stored is taken for text
                else:
                    length = part.bytes
                tokens += count_tokens(texts)
                size += length
            self._tokens_per_byte[name] = max(tokens, 1) / max(size, 1)

    def wanted_epochs(self) -> dict[str, float]:
        """How often each source is to be read; the least is 1. Before `weigh` all are read once.

        Raises:
            UserError: when one would be read more often than `max_epochs`.
        """
        if not self._tokens_per_byte:
            return dict.fromkeys(self.sources, 1.0)
        total = sum(source.weight for source in self.sources.values())
        per_epoch = {
            name: source.corpus.total_bytes * self._tokens_per_byte[name] / source.weight * total
            for name, source in self.sources.items()
        }
        longest = max(per_epoch.values())
        wanted = {name: longest / max(tokens, 1e-9) for name, tokens in per_epoch.items()}
        for name, epochs in wanted.items():
            if epochs > self.max_epochs:
                raise UserError(
                    f"corpus.sources.{name}: would be read {epochs:.1f} times, more than "
                    f"corpus.max_epochs={self.max_epochs:g}; lower its weight or raise that"
                )
        return wanted

    def parts(self, part_bytes: int = DEFAULT_PART_BYTES) -> list[Part]:
        parts_read: list[Part] = []
        for name, epochs in self.wanted_epochs().items():
            parts = self.sources[name].corpus.parts(part_bytes)
            for epoch in range(int(epochs)):
                parts_read += [replace(part, source=name, epoch=epoch) for part in parts]
            drawn = list(parts)
            random.Random(name).shuffle(drawn)
            left = (epochs - int(epochs)) * sum(part.bytes for part in parts)
            for part in drawn:
                if left < part.bytes / 2:
                    break
                parts_read.append(replace(part, source=name, epoch=int(epochs)))
                left -= part.bytes
        return parts_read

    def read_part(self, part: Part, refused: Counter[str]) -> Iterator[Document]:
        return self.sources[part.source].corpus.read_part(part, refused)


class CorpusWithHeldOut(Corpus):
    """A corpus that is trained on whole, and another, of the same kind, that is held out whole."""

    def __init__(self, train: Corpus, held_out: Corpus) -> None:
        self.splits = {"train": train, "heldout": held_out}

    @property
    def has_prompts(self) -> bool:
        return self.splits["train"].has_prompts

    @property
    def total_bytes(self) -> int:
        return sum(corpus.total_bytes for corpus in self.splits.values())

    def listing(self) -> list[tuple[str, int]]:
        return [
            (f"{split}: {file}", size)
            for split, corpus in self.splits.items()
            for file, size in corpus.listing()
        ]

    def parts(self, part_bytes: int = DEFAULT_PART_BYTES) -> list[Part]:
        return [
            replace(part, split=split)
            for split, corpus in self.splits.items()
            for part in corpus.parts(part_bytes)
        ]

    def read_part(self, part: Part, refused: Counter[str]) -> Iterator[Document]:
        return self.splits[part.split].read_part(part, refused)
