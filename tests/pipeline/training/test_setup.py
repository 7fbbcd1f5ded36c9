"""What a run's model is, from its settings."""

import pytest
from hydra import compose, initialize_config_dir

from data_prep.cli import config_dir
from data_prep.errors import UserError
from data_prep.manifest import Manifest
from pipeline.planning.plan import flops_at
from pipeline.planning.settings import Planned
from pipeline.training.identity import differences, refuse_changes, run_identity
from pipeline.training.settings import TrainSettings
from pipeline.training.setup import model_config


@pytest.fixture
def settings(data_dir, tmp_path):
    def make(*overrides: str) -> TrainSettings:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            cfg = compose("train", [f"data.dir={data_dir}", f"run_dir={tmp_path}", *overrides])
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


def test_a_plan_counts_the_pairs_of_causal_slots(data_dir):
    """The 16 blocks of 4 in a sequence of 64 have 6 pairs less each: three products' worth of 4
    operations for each dimension of each layer's heads."""
    flops = []
    for value in ("false", "true"):
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            cfg = compose("plan", [f"data.dir={data_dir}", f"layout.causal_slots={value}"])
        planned = Planned.from_config(cfg)
        flops.append(flops_at(planned, 1.0).attention)
    width = planned.model.num_layers * planned.model.num_heads * planned.model.head_dim
    assert flops[0] - flops[1] == 3 * 4 * width * planned.train.global_batch_size * 16 * 6
