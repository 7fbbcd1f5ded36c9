"""Groups of packed sequences that no preparation made, as the writer of shards takes them."""

import io

import numpy as np

from data_prep.formats.groups import group_arrays


def arrays_of(sequences):
    """The members of one sample, from `PackedSequence`s."""
    tables = [one.layout.table() for one in sequences]
    marks = [[False] if one.continued is None else one.continued.tolist() for one in sequences]
    prompts = [one.prompt_lengths for one in sequences]
    return group_arrays(
        np.stack([one.tokens for one in sequences]),
        [one.document_lengths.tolist() for one in sequences],
        (np.concatenate(tables), np.array([len(table) for table in tables])),
        marks,
        None if prompts[0] is None else [own.tolist() for own in prompts],
    )


def groups_of(sequences, group_size):
    """The members of each sample of a shard."""
    starts = range(0, len(sequences), group_size)
    return [arrays_of(sequences[start : start + group_size]) for start in starts]


def encoded(arrays):
    """The members of one sample as the bytes that stand in a shard."""
    members = {}
    for name, array in arrays.items():
        content = io.BytesIO()
        np.save(content, array)
        members[name] = content.getvalue()
    return members
