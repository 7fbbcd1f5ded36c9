"""The global order: a permutation of each epoch, in large pieces, the same for everybody."""

import itertools

import numpy as np
import pytest

from pipeline.data.batch import Share
from pipeline.data.order import SequenceOrder

SIZES = [10, 3, 7, 16, 1]


def places(order: SequenceOrder, epoch: int):
    first = epoch * order.epoch_sequences
    return [order[n] for n in range(first, first + order.epoch_sequences)]


def test_every_epoch_holds_every_sequence_once():
    order = SequenceOrder(SIZES, group_size=4, seed=3)
    everything = {(shard, index) for shard, size in enumerate(SIZES) for index in range(size)}
    for epoch in range(3):
        seen = places(order, epoch)
        assert len(seen) == len(everything)
        assert {(place.shard, place.index) for place in seen} == everything
        assert {place.epoch for place in seen} == {epoch}


def test_epochs_and_seeds_differ_and_repeat_exactly():
    order = SequenceOrder(SIZES, 4, seed=3)
    first, second = ([(p.shard, p.index) for p in places(order, epoch)] for epoch in (0, 1))
    assert first != second
    again = SequenceOrder(SIZES, 4, seed=3)
    assert [(p.shard, p.index) for p in places(again, 1)] == second
    other = SequenceOrder(SIZES, 4, seed=4)
    assert [(p.shard, p.index) for p in places(other, 0)] != first


def test_one_shard_has_another_order_in_every_epoch():
    """Of its groups, and of the sequences inside each."""
    order = SequenceOrder([64], group_size=8, seed=3)
    epochs = [[place.index for place in places(order, epoch)] for epoch in range(6)]
    assert len({tuple(n // 8 for n in indexes) for indexes in epochs}) == 6
    for group in range(8):
        inside = {tuple(n for n in indexes if n // 8 == group) for indexes in epochs}
        assert len(inside) == 6


def test_shards_and_groups_are_read_in_one_piece():
    seen = places(SequenceOrder(SIZES, group_size=4, seed=5), 0)
    groups = [(place.shard, place.index // 4) for place in seen]
    changes = sum(a != b for a, b in itertools.pairwise(groups))
    assert changes == len(set(groups)) - 1
    shards = [place.shard for place in seen]
    assert sum(a != b for a, b in itertools.pairwise(shards)) == len(SIZES) - 1


def test_any_start_gives_the_same_as_reading_up_to_it():
    straight = SequenceOrder(SIZES, 4, seed=1)
    sequence = [straight[n] for n in range(90)]
    for start in (0, 1, 36, 37, 74, 89):
        assert SequenceOrder(SIZES, 4, seed=1)[start] == sequence[start]


def test_order_is_mixed():
    """Positions after the permutation are not correlated with those before."""
    order = SequenceOrder([4096], group_size=16, seed=0)
    indexes = [place.index for place in places(order, 0)]
    assert abs(np.corrcoef(indexes, np.arange(4096))[0, 1]) < 0.2


@pytest.mark.parametrize(("sizes", "group"), [([], 4), ([3, 0], 4), ([3], 0)])
def test_empty_orders_are_refused(sizes, group):
    with pytest.raises(ValueError, match="at least one shard"):
        SequenceOrder(sizes, group, seed=0)


@pytest.mark.parametrize(
    ("world_size", "micro", "rounds"), [(1, 8, 1), (1, 2, 4), (2, 2, 2), (4, 1, 2), (8, 1, 1)]
)
def test_every_division_of_a_batch_is_the_same_batch(world_size, micro, rounds):
    shares = [Share(micro, rounds, rank, world_size) for rank in range(world_size)]
    assert {share.global_batch_size for share in shares} == {8}
    for seen in (0, 24):
        numbers = [share.numbers(seen) for share in shares]
        in_order = [
            n for a in range(rounds) for rank in range(world_size) for n in numbers[rank][a]
        ]
        assert in_order == list(range(seen, seen + 8))
