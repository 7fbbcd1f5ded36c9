"""Block lengths over a run: shares by step, the same whoever reads and from wherever."""

import pytest
from commands import ROOT, train_small
from omegaconf import OmegaConf

from data_prep.formats.manifest import Manifest
from data_prep.layout import BlockSizes
from pipeline.data.batch import Batch, Share, step_batches
from pipeline.data.source import BlockCurriculum, LayoutChoice, SequenceSource
from tidar_common.errors import UserError

CHOICE = LayoutChoice(
    block_size=8, block_sizes=[2, 4, 8], block_shares=[1, 0, 0], block_shares_end=[0, 1, 3],
    block_shares_from_step=3, block_shares_ramp_steps=10,
)  # fmt: skip
STEP = 8
"""Sequences of a global batch."""


def source(data_dir, choice=CHOICE) -> SequenceSource:
    manifest = Manifest.load(data_dir)
    return SequenceSource(data_dir, manifest, manifest.train, 0, choice, sequences_per_step=STEP)


def test_shares_move_linearly_between_two_steps():
    curriculum = BlockCurriculum.checked(
        BlockSizes.checked([4, 16], [3, 1], 16), [0, 1], from_step=10, ramp_steps=4
    )
    assert curriculum.at(0).shares == curriculum.at(10).shares == (0.75, 0.25)
    assert curriculum.at(12).shares == pytest.approx((0.375, 0.625))
    assert curriculum.at(14).shares == curriculum.at(9999).shares == (0.0, 1.0)
    at_once = BlockCurriculum.checked(curriculum.start, [0, 1], from_step=2, ramp_steps=0)
    assert [at_once.at(step).shares[1] for step in (1, 2)] == [0.25, 1.0]


def test_a_run_goes_from_short_blocks_to_long_ones(data_dir):
    reader = source(data_dir)

    def longest(steps: range) -> list[int]:
        numbers = [n for step in steps for n in range(STEP * step, STEP * (step + 1))]
        return [int(reader[n].layout.draft_lengths.max()) for n in numbers]

    assert set(longest(range(3))) == {2}
    assert set(longest(range(5, 10))) == {2, 4, 8}
    late = longest(range(13, 33))
    assert set(late) == {4, 8}
    assert late.count(8) > 2 * late.count(4)


def slots_of(batch: Batch) -> list:
    return [*batch.spans.upper.tolist(), *batch.spans.block.tolist()]


@pytest.mark.parametrize("world_size", [1, 2])
def test_neither_processes_nor_a_resume_change_what_is_drawn(data_dir, world_size):
    """Shapes stay, and every sequence of a step has the layout that the source gives it."""
    reader = source(data_dir)
    for rank in range(world_size):
        share = Share(2, STEP // 2 // world_size, rank, world_size)
        straight = step_batches(source(data_dir), share, 0, with_slots=True)
        steps = [next(straight) for _ in range(8)]
        straight.close()
        resumed = step_batches(source(data_dir), share, 6 * STEP, with_slots=True)
        assert [slots_of(b) for b in next(resumed)] == [slots_of(b) for b in steps[6]]
        resumed.close()
        assert {batch.input_ids.shape for step in steps for batch in step} == {(2, 128)}
        for step, batches in enumerate(steps):
            for batch, numbers in zip(batches, share.numbers(STEP * step), strict=True):
                expected = sum(reader[n].layout.num_slots for n in numbers)
                assert batch.diffusion_labels == expected
                blocks = [reader[n].layout.num_blocks for n in numbers]
                own = batch.spans.block[:, 64:]
                labelled = batch.rows[batch.ar_labels :] // 128
                for row, count in enumerate(blocks):
                    used = int((labelled == row).sum())
                    assert int(own[row, used - 1]) + 1 == count


@pytest.mark.parametrize(("values", "key"), [
    ({"block_shares_end": [1, 2]}, r"block_shares_end: says how often"),
    ({"block_sizes": [2, 4], "block_shares_end": [1]}, r"block_shares_end: needs a number for"),
    ({"block_sizes": [2, 4], "block_shares": [0, 0]}, r"block_shares: needs a number for"),
    ({"block_sizes": [2, 4], "block_shares_end": [-1, 2]}, r"block_shares_end: needs a number for"),
    ({"block_shares_from_step": -1}, r"block_shares_from_step: must be 0 or more"),
    ({"block_shares_ramp_steps": -1}, r"block_shares_ramp_steps: must be 0 or more"),
])  # fmt: skip
def test_mistakes_are_named(values, key):
    with pytest.raises(UserError, match=rf"layout\.{key}"):
        LayoutChoice(**values)


def test_the_shipped_curriculum_is_one():
    values = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "curriculum" / "growing.yaml"))
    curriculum = LayoutChoice(block_size=16, **values).mixed(16)
    assert curriculum.at(0).shares == (1.0, 0.0, 0.0)
    assert max(curriculum.at(10**6).shares) == curriculum.at(10**6).shares[2]


def test_a_run_takes_it_from_its_config(data_dir, tmp_path):
    done = train_small(
        data_dir, tmp_path / "run", "steps=2", "evals.decode_speed.every=0", "wandb.mode=disabled",
        "curriculum=growing", "layout.block_size=4", "layout.block_sizes=[1,2,4]",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    config = OmegaConf.load(tmp_path / "run" / "config.yaml")
    assert config.layout.block_shares == [1, 0, 0]
    assert config.layout.block_size == 4
