"""Prompts out of prepared data: how its documents begin, read from the shards one by one."""

from array import array
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.formats.groups import PackedGroup, PackedSequence
from data_prep.formats.manifest import SPLITS, Manifest
from data_prep.formats.shards import ShardReader
from data_prep.tokenizers.load import Tokenizer, load_tokenizer
from pipeline.decoding.prompts import PromptRow, Share
from pipeline.decoding.text import INCOMPLETE
from tidar_common.errors import UserError

ORDER_SEED = 0
"""Of the order in which groups are read: the same for every seed of the sampling, so that a second
answer is to the same prompts."""


class DocumentPrompts:
    """The beginnings of the documents of one split, in an order that depends on the data alone.

    Groups of packed sequences come in a random order, so that the first prompts are a sample of
    the whole split. What is kept in memory of a prompt is where it stands, 32 bytes.

    Only documents that are longer than their prompt count, and of a document that was cut only
    its first piece.
    """

    def __init__(
        self,
        data_dir: Path,
        tokenizer: Tokenizer,
        *,
        split: str,
        prompt_tokens: int | None,
        limit: int | None,
        share: Share,
    ) -> None:
        """Find this share's prompts; reads the shards once, up to `limit` prompts.

        Args:
            data_dir: a folder written by `tidar-prepare`.
            tokenizer: the model's.
            split: `train` or `heldout`.
            prompt_tokens: tokens of each prompt; None takes the prompts that the data was prepared
                with.
            limit: most prompts of all shares together.
            share: which of them are this process's.

        Raises:
            UserError: when no document is long enough, or the data has another tokenizer.
        """
        if split not in SPLITS:
            raise UserError(f"prompts_split: {split!r} is not {' or '.join(SPLITS)}")
        manifest = Manifest.load(data_dir)
        if load_tokenizer(data_dir).content() != tokenizer.content():
            raise UserError(
                f"prompts_data: {data_dir} was prepared with another tokenizer than the model's; "
                "give data prepared with the model's, or the prompts as text in a prompts_file"
            )
        self._dir, self._tokenizer, self._manifest = data_dir, tokenizer, manifest
        self._prompt_tokens = prompt_tokens
        chosen = manifest.splits[split]
        first = 0 if split == SPLITS[0] else len(manifest.train.shards)
        index = manifest.shard_index(data_dir)[first : first + len(chosen.shards)]
        self._shards = list(zip(chosen.shards, index, strict=True))
        self._first_group = np.cumsum([0] + [manifest.groups(shard) for shard in chosen.shards])
        self._group = lru_cache(maxsize=1)(self._read_group)
        self.settings: dict[str, Any] = {
            "data": manifest.fingerprint(), "split": split, "prompt_tokens": prompt_tokens,
        }  # fmt: skip
        self.total, self._places = self._find(limit, share)
        if not self.total:
            raise UserError(f"prompts_data: no document of {data_dir}'s {split} split {self._lack}")

    @property
    def _lack(self) -> str:
        if self._prompt_tokens is None:
            return "has a prompt; give prompt_tokens"
        return f"has more than {self._prompt_tokens} tokens; give a smaller prompt_tokens"

    def __len__(self) -> int:
        return len(self._places)

    def id_of(self, place: int) -> str:
        """Names the shard, the sequence in it, and the token in that at which the prompt begins."""
        group, sequence, start, _ = self._places[place].tolist()
        shard, number = self._shard_of(group)
        name = self._shards[shard][0].name
        return f"{name}:{number * self._manifest.group_size + sequence}:{start}"

    def __getitem__(self, place: int) -> PromptRow:
        group, sequence, start, length = self._places[place].tolist()
        ids = self._group(group)[sequence].tokens[start : start + length]
        # A character that the cut divides is left out.
        text = self._tokenizer.decode(ids.tolist()).rstrip(INCOMPLETE)
        return PromptRow(self.id_of(place), text)

    def text_of(self, identity: str) -> str | None:
        """Not known without reading; `settings` tell other data apart."""

    def _find(self, limit: int | None, share: Share) -> tuple[int, NDArray[np.int64]]:
        """How many prompts there are for all, and of this share's own: group, sequence in it,
        first token and length, int64 [prompts, 4]."""
        found = array("q")
        total = 0
        for place in self._everywhere():
            if total == limit:
                break
            if total % share.count == share.index:
                found.extend(place)
            total += 1
        return total, np.array(found, dtype=np.int64).reshape(-1, 4)

    def _everywhere(self) -> Iterator[tuple[int, int, int, int]]:
        groups = np.random.default_rng(ORDER_SEED).permutation(int(self._first_group[-1]))
        for group in groups.tolist():
            for number, sequence in enumerate(self._group(group)):
                for start, length in self._beginnings(sequence):
                    yield group, number, start, length

    def _beginnings(self, sequence: PackedSequence) -> list[tuple[int, int]]:
        """First token and length of the prompts in a sequence."""
        lengths = np.asarray(sequence.document_lengths, dtype=np.int64)
        starts = np.cumsum(lengths) - lengths
        if self._prompt_tokens is not None:
            sizes = np.full_like(lengths, self._prompt_tokens)
        elif sequence.prompt_lengths is None:
            return []
        else:
            sizes = np.asarray(sequence.prompt_lengths, dtype=np.int64)
        real = sequence.real_tokens(self._manifest.tokenizer.pad_id)
        fits = (starts < real) & (sizes > 0) & (sizes < lengths)
        if sequence.continued is not None:
            fits &= ~sequence.continued
        starts, sizes = starts[fits], sizes[fits]
        # An end token alone is nothing to continue with.
        more = sequence.tokens[starts + sizes] != self._manifest.tokenizer.eos_id
        return list(zip(starts[more].tolist(), sizes[more].tolist(), strict=True))

    def _shard_of(self, group: int) -> tuple[int, int]:
        """The shard that holds `group` of the split, and which of its groups that is."""
        shard = int(np.searchsorted(self._first_group, group, side="right")) - 1
        return shard, group - int(self._first_group[shard])

    def _read_group(self, group: int) -> PackedGroup:
        shard, number = self._shard_of(group)
        info, offsets = self._shards[shard]
        reader = ShardReader(self._dir / info.name, offsets)
        try:
            return reader.read_group(number)
        finally:
            reader.close()
