"""`tidar-prepare inspect=N`: the layout of a stored sequence, as text and as a picture.

The picture has a row for every query and a column for every key, the clean section before the mask
section: who may attend to whom. It is drawn from the documents and the table alone.
"""

from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.formats.groups import PackedSequence
from data_prep.formats.manifest import Manifest
from data_prep.formats.shards import ShardReader
from data_prep.tokenizers.load import Tokenizer, load_tokenizer
from tidar_common.errors import UserError
from tidar_common.figures import png
from tidar_common.files import written_atomically

LARGEST_SECTION = 1024
"""Positions and slots that are drawn, a pixel each; longer sections are cut off there."""
SHOWN_BLOCKS = 12
SHOWN_CHARACTERS = 48
NOTHING = (255, 255, 255)
CLEAN = ((46, 94, 170), (92, 143, 214))
PREFIX = ((208, 120, 36), (232, 165, 94))
OWN = (176, 42, 70)
PROMPT = (150, 160, 172)
"""Colours: a clean query's keys by document, a slot's prefix by block, a block's own slots, and the
keys of a prompt, which nothing is learnt of."""


def inspect_sequence(folder: Path, number: int) -> str:
    """Draw sequence `number` of the train split into `folder`-inspect-N.png beside the folder.

    Returns:
        str: what stands in it, and where the picture is.

    Raises:
        UserError: when there is no such sequence, or no room for the picture.
    """
    manifest = Manifest.load(folder)
    sequence = stored_sequence(folder, manifest, number)
    path = folder.with_name(f"{folder.name}-inspect-{number}.png")
    real = sequence.real_tokens(manifest.tokenizer.pad_id)
    try:
        with written_atomically(path) as file:
            file.write(png(attention_picture(sequence, real)))
    except OSError as error:
        raise UserError(
            f"inspect: {path} cannot be written ({error.strerror}); make {path.parent} writable"
        ) from error
    text = describe(sequence, real, load_tokenizer(folder))
    return f"sequence {number} of {folder}\n{text}\n{path}"


def stored_sequence(folder: Path, manifest: Manifest, number: int) -> PackedSequence:
    """Sequence `number` of the train split, counted from 0 over its shards."""
    first = 0
    for shard, offsets in zip(manifest.train.shards, manifest.shard_index(folder), strict=False):
        if number < first + shard.sequences:
            group, inside = divmod(number - first, manifest.group_size)
            return ShardReader(folder / shard.name, offsets).read_group(group)[inside]
        first += shard.sequences
    raise UserError(f"inspect: there are {first} sequences, so give a number up to {first - 1}")


def describe(sequence: PackedSequence, real: int, tokenizer: Tokenizer) -> str:
    """Documents and blocks as lines of text."""
    layout = sequence.layout
    lines = [
        f"clean section: {len(sequence.tokens)} tokens, {len(sequence.tokens) - real} of them "
        f"padding; mask section: {layout.num_slots} slots in {layout.num_blocks} blocks"
    ]
    start = 0
    marks = np.zeros(0, dtype=bool) if sequence.continued is None else sequence.continued
    for number, length in enumerate(sequence.document_lengths.tolist()):
        end = start + length
        if start < real:
            blocks = int(((layout.prefix_end >= start) & (layout.prefix_end < end)).sum())
            begun = ", goes on from a cut" if number < len(marks) and marks[number] else ""
            if sequence.prompt_lengths is not None and (prompt := sequence.prompt_lengths[number]):
                begun += f", of which {prompt} tokens are a prompt"
            text = tokenizer.decode(sequence.tokens[start : min(end, start + 40)].tolist())
            lines.append(
                f"document {number}: {start} to {end - 1}, {blocks} blocks{begun}: "
                f"{text[:SHOWN_CHARACTERS]!r}"
            )
        start = end
    lines.append("block: sees of the text, drafts, slots")
    for block, row in enumerate(islice(layout.table().tolist(), SHOWN_BLOCKS)):
        prefix, first, last, slot = row
        seen = f"{prefix} to {first - 1}" if first > prefix else "nothing"
        slots = f"{slot} to {slot + last - first - 1}"
        lines.append(f"{block}: {seen}, {first} to {last - 1}, {slots}")
    if layout.num_blocks > SHOWN_BLOCKS:
        lines.append(f"… and {layout.num_blocks - SHOWN_BLOCKS} more blocks")
    return "\n".join(lines)


def attention_picture(sequence: PackedSequence, real: int) -> NDArray[np.uint8]:
    """RGB pixels [side, side, 3]: a row for every query, a column for every key, of which each
    section shows the first `LARGEST_SECTION`."""
    layout = sequence.layout
    clean = min(len(sequence.tokens), LARGEST_SECTION)
    slots = min(layout.num_slots, LARGEST_SECTION)
    picture = np.full((clean + slots, clean + slots, 3), NOTHING, dtype=np.uint8)
    start = 0
    for number, length in enumerate(sequence.document_lengths.tolist()):
        end = min(start + length, clean)
        if start < min(real, clean):
            seen = np.tril(np.ones((end - start, end - start), dtype=bool))
            picture[start:end, start:end][seen] = CLEAN[number % 2]
            if sequence.prompt_lengths is not None:
                prompt = min(start + int(sequence.prompt_lengths[number]), end) - start
                picture[start:end, start : start + prompt][seen[:, :prompt]] = PROMPT
        start += length
    for block, (prefix, first, last, slot) in enumerate(layout.table().tolist()):
        rows = slice(clean + slot, clean + min(slot + last - first, slots))
        if slot < slots:
            picture[rows, min(prefix, clean) : min(first, clean)] = PREFIX[block % 2]
            picture[rows, rows] = OWN
    return picture
