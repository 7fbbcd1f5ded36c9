"""A mix of prepared sets: shares, order, refusals, and a run whose weights change."""

import dataclasses
import json
import shutil
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from commands import prepare_small, train_small

from data_prep.formats.manifest import Manifest
from pipeline.data.batch import sequence_digest
from pipeline.data.mix import WINDOW, MixedSource, MixOrder, open_mix
from pipeline.data.place import DataConfig
from pipeline.data.source import DamagedShard, LayoutChoice, SequenceSource
from pipeline.status import read_status
from pipeline.training.guards.skipped_shards import SkippedShards
from tidar_common.errors import UserError

STEP = 8


@pytest.fixture(scope="module")
def other_dir(data_dir, tmp_path_factory):
    """A second set with the tokenizer of `data_dir`, of other text and other shards."""
    return prepare_small(
        tmp_path_factory.mktemp("mix") / "other", "corpus.max_bytes=150000", "seed=5",
        f"tokenizer.path={data_dir / 'tokenizer.model'}", "shard_sequences=100",
    )  # fmt: skip


def sets_of(data_dir, other_dir, first, second, choice=None):
    mix = {"one": {"dir": str(data_dir), "weight": first},
           "two": {"dir": str(other_dir), "weight": second}}  # fmt: skip
    config = DataConfig(dir=str(data_dir), mix=mix)
    return open_mix(config, Manifest.load(data_dir), choice or LayoutChoice())


def mixed(data_dir, other_dir, first, second, choice=None, seed=0):
    choice = choice or LayoutChoice()
    sets = sets_of(data_dir, other_dir, first, second, choice)
    manifest = Manifest.load(data_dir)
    return MixedSource(sets, manifest, seed, choice, DataConfig(), STEP)


@pytest.mark.parametrize("phases", [
    [(0, [0.7, 0.3])],
    [(0, [1, 2, 3]), (7, [1, 0, 0]), (12_345, [5, 1, 1]), (40_000, [0, 1, 1])],
])  # fmt: skip
def test_the_order_equals_a_count_from_the_beginning(phases):
    """Every set is read in its own order without a gap, whatever the weights do."""
    order, again = MixOrder(phases, seed=3), MixOrder(phases, seed=3)
    sets = len(phases[0][1])
    counts = np.zeros(sets, dtype=int)
    for n in range(4 * WINDOW + 500):
        one, number = order[n]
        assert number == counts[one]
        if n % 997 == 0 or n in (7, 12_345, 40_000):
            assert order.before(n).tolist() == counts.tolist()
            assert again[n] == (one, number), "from any start"
        counts[one] += 1
    starts = [*(start for start, _ in phases), 4 * WINDOW]
    for (start, weights), end in zip(phases, starts[1:], strict=True):
        got = order.before(end) - order.before(start)
        expected = np.array(weights) / sum(weights) * (end - start)
        assert abs(got - expected).max() < 4 * np.sqrt(WINDOW) / 2
        assert (got[np.array(weights) == 0] == 0).all()


def test_whole_windows_have_the_shares_exactly():
    order = MixOrder([(0, [0.7, 0.2, 0.1])], seed=0)
    assert order.before(3 * WINDOW).tolist() == [21_000, 6_000, 3_000]
    firsts = [Counter(order[n][0] for n in range(a, a + 500))[0] for a in range(0, WINDOW, 500)]
    assert min(firsts) > 300, "mixed all through the window"
    with pytest.raises(UserError, match="less than one of 10,000"):
        MixOrder([(0, [1, 1e-6])], seed=0)


def test_sequences_are_those_of_the_sets(data_dir, other_dir):
    source = mixed(data_dir, other_dir, 0.25, 0.75)
    alone = [SequenceSource(one.dir, one.manifest, one.manifest.train, 0) for one in source.sets]
    for n in range(300):
        one, number = source.order[n]
        assert sequence_digest(source[n]) == sequence_digest(alone[one][number])
    tokens = Counter()
    for n in range(4000):
        one, _ = source.order[n]
        tokens[source.sets[one].name] += int(source[n].real_lengths.sum())
    assert tokens["two"] / tokens.total() == pytest.approx(0.75, abs=0.02)
    assert source.epochs(4000)["two"] > 2 > source.epochs(4000)["one"]


def test_the_order_does_not_depend_on_names_or_their_order(data_dir, other_dir):
    source = mixed(data_dir, other_dir, 1, 3)
    mix = {"b": {"dir": str(other_dir), "weight": 3}, "a": {"dir": str(data_dir), "weight": 1}}
    manifest = Manifest.load(data_dir)
    sets = open_mix(DataConfig(dir=str(data_dir), mix=mix), manifest, LayoutChoice())
    renamed = MixedSource(sets, manifest, 0, LayoutChoice(), DataConfig(), STEP)
    for n in range(0, 500, 7):
        assert sequence_digest(source[n]) == sequence_digest(renamed[n])


def test_layouts_follow_the_step_of_the_run(data_dir, other_dir):
    """Not the place in the set: a curriculum counts optimizer steps."""
    choice = LayoutChoice(
        block_size=8, block_sizes=[2, 8], block_shares=[1, 0], block_shares_end=[0, 1],
        block_shares_from_step=20, block_shares_ramp_steps=1,
    )  # fmt: skip
    source = mixed(data_dir, other_dir, 1, 1, choice)
    assert {int(source[n].layout.draft_lengths.max()) for n in range(20 * STEP)} == {2}
    assert {int(source[n].layout.draft_lengths.max()) for n in range(22 * STEP, 300)} == {8}


def test_what_does_not_go_together_is_named(data_dir, other_dir, tmp_path):
    def tampered(name, **changes):
        own = Manifest.load(other_dir)
        folder = tmp_path / name
        folder.mkdir()
        dataclasses.replace(own, **changes).save(folder)
        return folder

    tokenizer = dataclasses.replace(Manifest.load(other_dir).tokenizer, sha256="other")
    with pytest.raises(UserError, match=r"^data\.mix\.two: .* another tokenizer than data\.dir"):
        sets_of(data_dir, tampered("tokenizer", tokenizer=tokenizer), 1, 1)
    with pytest.raises(UserError, match=r"^data\.mix\.two: .* sequences of 128 tokens"):
        sets_of(data_dir, tampered("length", sequence_length=128), 1, 1)
    blocks = tampered("blocks", block_size=16)
    with pytest.raises(UserError, match=r"^data\.mix\.two: .*layout\.block_size=16"):
        sets_of(data_dir, blocks, 1, 1)
    assert len(sets_of(data_dir, blocks, 1, 1, LayoutChoice(block_size=4))) == 2
    with pytest.raises(UserError, match=r"^data\.mix\.two: is the same data as data\.mix\.one"):
        sets_of(data_dir, data_dir, 1, 1)
    with pytest.raises(UserError, match=r"^data\.mix\.two\.dir: .* does not exist"):
        sets_of(data_dir, tmp_path / "none", 1, 1)


@pytest.mark.parametrize("weight", [-1, "much", {5: 1}, {0: 1, 3: -1}, {0.5: 1, 0: 1}, True])
def test_bad_weights_are_refused(data_dir, other_dir, weight):
    with pytest.raises(UserError, match=r"^data\.mix\.two\.weight: "):
        sets_of(data_dir, other_dir, 1, weight)


def test_a_phase_without_weights_is_refused(data_dir, other_dir):
    with pytest.raises(UserError, match="all weights are 0 from step 9 on"):
        sets_of(data_dir, other_dir, {0: 1, 9: 0}, {0: 1, 9: 0})


def test_a_run_goes_on_with_its_mix_and_changes_it_by_a_step(data_dir, other_dir, tmp_path):
    """Stopped and continued it sees what an uninterrupted one sees; other weights need leave."""

    def mix(second):
        return (f"data.mix={{one:{{dir:{data_dir},weight:0.5}},"
                f"two:{{dir:{other_dir},weight:{second}}}}}")  # fmt: skip

    def last(run_dir, name="metrics.jsonl"):
        return json.loads((run_dir / name).read_text().splitlines()[-1])

    def train(name, weight, *more):
        return train_small(
            data_dir, tmp_path / name, mix(weight), "evals.decode_speed.every=0", *more
        )

    changing = "{0:0.5,6:4}"
    straight = train("straight", changing, "steps=8")
    assert straight.returncode == 0, straight.stderr
    assert "data.mix: " in straight.stdout
    row = last(tmp_path / "straight", "evals/decode_speed.jsonl")
    losses = [row["by_source"][name]["ar_loss"] for name in ("one", "two")]
    assert losses[0] == row["ar_loss"] != losses[1], "`one` is data.dir itself"
    first = train("run", "0.5", "steps=4")
    assert first.returncode == 0, first.stderr
    refused = train("run", changing, "steps=8")
    assert refused.returncode == 2
    assert "checkpoint.allow_changes=[data.mix]" in refused.stderr
    again = train("run", changing, "steps=8", "checkpoint.allow_changes=[data.mix]")
    assert again.returncode == 0, again.stderr
    assert last(tmp_path / "run")["data_digest"] == last(tmp_path / "straight")["data_digest"]


def test_shards_that_a_run_went_on_without_are_written_down_once(data_dir, other_dir, tmp_path):
    """Whichever ranks met them, and however often the run starts again."""
    broken = shutil.copytree(data_dir, tmp_path / "broken")
    damaged = {shard.name for shard in Manifest.load(broken).train.shards}
    for name in damaged:
        (broken / name).write_bytes(b"?" * 1000)
    run_dir = tmp_path / "run"
    mix = f"data.mix={{bad:{{dir:{broken},weight:0.5}},good:{{dir:{other_dir},weight:0.5}}}}"
    done = train_small(
        broken, run_dir, mix, "data.skip_damaged=true", "evals.decode_speed.every=0", "steps=3",
        "evals.decode_speed.prompts=1", "evals.decode_speed.score_sequences=1", processes=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (run_dir / "skipped_shards.jsonl").open()]
    met = [line["shard"] for line in lines]
    assert met
    assert len(met) == len(set(met))
    assert set(met) <= damaged
    for line in lines:
        assert line.keys() == {"set", "shard", "reason", "step", "rank"}
        assert line["set"] == "bad"
        assert line["rank"] in (0, 1)
        assert 1 <= line["step"] <= 3
        assert "missing or damaged shard" in line["reason"]
    events = [json.loads(line) for line in (run_dir / "events.jsonl").open()]
    told = [event for event in events if event["event"] == "shard_skipped"]
    assert [{key: event[key] for key in lines[0]} for event in told] == lines
    again = [DamagedShard("bad", name, "as before", 4) for name in met]
    world = SimpleNamespace(is_main=True, gather=lambda own: [[], own])
    record = SkippedShards(run_dir, lambda: [*again, DamagedShard("good", met[0], "new", 5)], world)
    assert record.new() == len(met) + 1
    found = [(event["set"], event["rank"]) for event in record.record()]
    assert found == [("good", 1)], "a restart knows the others"
    assert (record.new(), record.record()) == (0, [])
    shown = dict(read_status(run_dir, 0.0).rows())["shards"]
    assert shown.startswith(f"{len(met) + 1} damaged, left out: bad: {met[0]}")
    assert f"bad: {met[0]}" in (run_dir / "report.html").read_text()
