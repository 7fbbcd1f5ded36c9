"""What a run's model is, from its settings."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir

from data_prep.formats.manifest import Manifest
from pipeline.checkpoint.write import differences, refuse_changes
from pipeline.data.place import DataConfig
from pipeline.planning.plan import flops_at
from pipeline.planning.settings import Planned
from pipeline.training.settings import TrainSettings
from pipeline.training.setup import (
    check_data,
    model_config,
    open_sequences,
    run_identity,
    slow_on,
)
from tidar_common.cli import config_dir
from tidar_common.errors import UserError


@pytest.fixture
def settings(data_dir, tmp_path):
    def make(*overrides: str) -> TrainSettings:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            cfg = compose(
                "train",
                ["model=tiny", f"data.dir={data_dir}", f"run_dir={tmp_path}", *overrides],
            )
        return TrainSettings.from_config(cfg, Manifest.load(data_dir))

    return make


def test_causal_slots_of_the_layout_are_part_of_the_model(settings):
    plain, causal = settings(), settings("layout.causal_slots=true")
    assert not model_config(plain).causal_slots
    assert model_config(causal).causal_slots
    assert not model_config(settings("layout.causal_slots=true", "objective=ar")).causal_slots
    saved, asked = (run_identity(own, model_config(own)) for own in (causal, plain))
    changed = differences(saved, asked)
    assert list(changed) == ["model.causal_slots"]
    with pytest.raises(UserError, match=r"model\.causal_slots=True, this run has .*=False"):
        refuse_changes("step-00000001", changed, [])


def test_a_run_looks_for_all_its_shards_before_it_starts(settings, data_dir, tmp_path):
    """On every node: what any of them misses, all know."""
    folder = shutil.copytree(data_dir, tmp_path / "data")
    shard = folder / Manifest.load(folder).train.shards[-1].name

    nodes = SimpleNamespace(gather=lambda value: [None, value])
    run = replace(settings(), data_dir=folder)
    patient = replace(run, data=DataConfig(skip_damaged=True))
    said: list[str] = []
    check_data(run, nodes, said.append)
    shard.unlink()
    with pytest.raises(UserError, match=f"^data.dir: {shard} is missing; .*skip_damaged=true"):
        check_data(run, nodes, said.append)
    assert said == []
    check_data(patient, nodes, said.append)
    (line,) = said
    assert line.startswith(f"warning: data.dir: {shard} is missing")


def test_linear_drafts_are_part_of_the_model_and_need_a_head(settings):
    with pytest.raises(UserError, match=r"^layout\.linear: needs a draft head.* model\.draft_rank"):
        model_config(settings("layout.linear=true"))
    linear = settings("layout.linear=true", "model.draft_rank=4")
    assert model_config(linear).linear_drafts
    assert not model_config(settings("model.draft_rank=4")).linear_drafts
    assert not model_config(settings("layout.linear=true", "objective=ar")).linear_drafts
    by_model = settings("model.draft_rank=4", "+model.linear_drafts=true")
    assert by_model.layout.linear, "the data is laid out for the model"
    assert open_sequences(by_model).block_slots == 7


def test_a_plan_counts_the_slots_of_linear_drafts(data_dir):
    """Of 2K - 1 = 7 slots 4 are drafted: fewer rows meet the LM head, as many the layers."""
    planned = []
    for value in ("false", "true"):
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            cfg = compose(
                "plan",
                ["model=tiny", f"data.dir={data_dir}", f"layout.linear={value}",
                 "model.draft_rank=4", "objective.alone_share=0", "objective.alpha=1.0"],
            )  # fmt: skip
        planned.append(Planned.from_config(cfg))
    plain, linear = planned
    assert (linear.block_size, linear.block_slots) == (4, 7)
    assert (linear.num_slots, linear.rows) == (plain.num_slots, plain.rows) == (64, 128)
    drafted = 37  # of 64 slots 4 in 7, rounded up
    model, sequences = linear.model, linear.train.global_batch_size
    head = model.num_embeddings * (model.hidden_size + model.draft_rank)
    fewer = 6 * sequences * (64 - drafted) * (head + model.num_cell_products)
    flops = [flops_at(one, 1.0) for one in planned]
    assert flops[0].weights - flops[1].weights == fewer
    pairs = (
        sum(7 * (7 + 7 * n) for n in range(9)) + (63 + 1) - sum(4 * (4 + 4 * n) for n in range(16))
    )
    width = model.num_layers * model.num_heads * model.head_dim
    assert flops[1].attention - flops[0].attention == 3 * 4 * width * sequences * pairs


def test_a_plan_counts_the_pairs_of_causal_slots(data_dir):
    """The 16 blocks of 4 in a sequence of 64 have 6 pairs less each: three products' worth of 4
    operations for each dimension of each layer's heads."""
    flops = []
    for value in ("false", "true"):
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            cfg = compose(
                "plan", ["model=tiny", f"data.dir={data_dir}", f"layout.causal_slots={value}"]
            )
        planned = Planned.from_config(cfg)
        flops.append(flops_at(planned, 1.0).attention)
    width = planned.model.num_layers * planned.model.num_heads * planned.model.head_dim
    assert flops[0] - flops[1] == 3 * 4 * width * planned.train.global_batch_size * 16 * 6


@pytest.mark.parametrize(
    ("capability", "device", "precision", "slow"),
    [
        ("AVX2", "cpu", "bf16", True),
        ("AVX2", "cpu", "fp32", False),
        ("AVX2", "cuda", "bf16", False),
        ("AVX512", "cpu", "bf16", False),
    ],
)
def test_a_precision_that_is_emulated_is_known(monkeypatch, capability, device, precision, slow):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert slow_on(torch.device(device), precision) is slow
