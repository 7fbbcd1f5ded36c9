"""`tidar-prepare stats=true`: what a prepared folder holds, in numbers and bars."""

from collections import Counter
from pathlib import Path

import numpy as np

from data_prep.manifest import Manifest, Split
from data_prep.shards import ShardReader

BAR = 40
"""Characters of the longest bar."""


def describe_data(folder: Path) -> str:
    """Counts of both splits, the lengths of what stands in train, sources, and what was refused.

    Raises:
        UserError: naming a file that cannot be read.
    """
    manifest = Manifest.load(folder)
    lines = [
        f"{folder}: sequences of {manifest.sequence_length} tokens, encoder {manifest.encoder}"
    ]
    for name, split in manifest.splits.items():
        lines += _describe_split(name, split)
    lines.append("train: pieces by length in tokens (whole documents, and what cuts made)")
    lengths, continued = piece_lengths(folder, manifest)
    most = max(lengths.values())
    for power in range(min(lengths), max(lengths) + 1):
        low, high = 1 << power, (2 << power) - 1
        bar = "#" * round(BAR * lengths[power] / most)
        lines.append(f"  {low:>8,} to {high:>8,}  {lengths[power]:>10,}  {bar}".rstrip())
    lines.append(f"  {continued:,} of them go on from a cut")
    total = sum(split.tokens for split in manifest.splits.values())
    for name, own in sorted(manifest.sources.items(), key=lambda item: -item[1]["tokens"]):
        lines.append(
            f"source {name}: {own['tokens']:,} tokens, {own['tokens'] / total:.1%} of all, "
            f"{own['tokens'] / own['text_bytes']:.3f} tokens per byte, "
            f"read {own['epochs']:.2f} times"
        )
    for reason, count in Counter(manifest.documents["refused"]).most_common():
        lines.append(f"refused: {count:,} of {manifest.documents['read']:,} documents, {reason}")
    for rule, count in Counter(manifest.documents.get("filtered", {})).most_common():
        lines.append(f"filtered: {count:,} of {manifest.documents['read']:,} documents, {rule}")
    return "\n".join(lines)


def _describe_split(name: str, split: Split) -> list[str]:
    padding = split.padding / (split.padding + split.tokens)
    sizes = [shard.bytes for shard in split.shards]
    return [
        f"{name}: {split.documents:,} documents, {split.tokens:,} tokens, "
        f"{split.tokens / split.text_bytes:.3f} tokens per byte, "
        f"{split.tokens / split.documents:,.0f} tokens per document",
        f"  {split.sequences:,} sequences, {padding:.3%} padding, "
        f"{split.cut_documents:,} documents cut, {split.cut_though_fitting:,} of them though they "
        "fit",
        f"  {len(sizes):,} shards of {min(sizes) / 1e6:.1f} to {max(sizes) / 1e6:.1f} MB",
    ]


def piece_lengths(folder: Path, manifest: Manifest) -> tuple[Counter[int], int]:
    """How many pieces of the train split have 2^p to 2^(p+1) - 1 tokens, by p, padding left out;
    and how many go on from a cut."""
    found: Counter[int] = Counter()
    continued = 0
    for shard, offsets in zip(manifest.train.shards, manifest.shard_index(folder), strict=False):
        reader = ShardReader(folder / shard.name, offsets)
        for number in range(reader.num_groups):
            for sequence in reader.read_group(number):
                lengths = sequence.document_lengths.astype(np.int64)
                if sequence.real_tokens(manifest.tokenizer.pad_id) < len(sequence.tokens):
                    lengths = lengths[:-1]
                found.update((np.frexp(lengths)[1] - 1).tolist())
                continued += 0 if sequence.continued is None else int(sequence.continued.sum())
    return found, continued
