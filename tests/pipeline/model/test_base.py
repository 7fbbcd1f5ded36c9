"""`init_from` alone says what a model is; what is given beside it must agree."""

import json

import pytest
import torch
from commands import run
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file
from small_models import huggingface_tokenizer, write_huggingface

from data_prep.formats.manifest import Manifest
from pipeline.model.base import with_base
from pipeline.model.huggingface import config_from_huggingface
from pipeline.model.loading import check_tokenizer, open_model
from pipeline.planning.config import Planned
from pipeline.training.settings import TrainSettings
from pipeline.training.setup import model_config
from tidar_common.cli import config_dir
from tidar_common.errors import UserError

SCALED = {
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 5000.0, "factor": 2.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 128,
    }
}  # fmt: skip
FOLDERS = {
    "qwen2": {}, "qwen3": {"tie_word_embeddings": True}, "llama": SCALED,
    "mistral": {"sliding_window": None},
}  # fmt: skip


def composed(*overrides: str, command: str = "train"):
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose(command, ["run_dir=x", *overrides])


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    write_huggingface(folder, "qwen3", huggingface_tokenizer())
    return folder


@pytest.mark.parametrize("family", FOLDERS)
def test_the_folder_alone_gives_the_shape(family, tmp_path, data_dir):
    write_huggingface(tmp_path, family, **FOLDERS[family])
    cfg = composed(f"data.dir={data_dir}", f"init_from={tmp_path}", "model.draft_rank=3")
    settings = TrainSettings.from_config(cfg)
    said = config_from_huggingface(tmp_path / "config.json")
    vocabulary = Manifest.load(data_dir).tokenizer.vocab_size
    assert vocabulary == 400 > said.num_embeddings
    config = model_config(settings)
    mine = {**config.to_dict(), "vocab_size": 330, "mask_token_id": None, "block_size": None}
    assert mine == {**said.to_dict(), "draft_rank": 3}
    assert config.num_embeddings == 400  # rows are added for the data's tokenizer
    assert settings.resolved["model"]["hidden_size"] == 32  # the run's config is whole


@pytest.mark.parametrize(("dtype", "precision"), [("float32", "fp32"), ("bfloat16", "bf16"),
                                                  ("float16", "bf16")])  # fmt: skip
def test_precision_follows_the_weights(tmp_path, dtype, precision):
    model = write_huggingface(tmp_path, "llama")
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path)
    assert with_base(composed("data.dir=x", f"init_from={tmp_path}")).cfg.precision == precision
    asked = composed("data.dir=x", f"init_from={tmp_path}", "precision=fp32")
    assert with_base(asked).cfg.precision == "fp32"
    assert with_base(composed("data.dir=x", "model=tiny")).cfg.precision == "bf16"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model.hidden_size=64"], r"has hidden_size 32, .* has 64; .*model\.hidden_size=32"),
        (["model=tiny"], "has hidden_size 32, the config has 160"),
        (["model.rope_theta=1e4"], r"has rope_theta 5000\.0, the config has 10000\.0"),
        (["model.tie_embeddings=true"], "has tie_embeddings false, the config has true"),
        (["model.hidden=64"], r"model\.hidden: unknown key; did you mean hidden_size"),
    ],
)  # fmt: skip
def test_what_disagrees_is_refused_with_both_values(base, overrides, says):
    words = [word.replace("model.hidden=", "+model.hidden=") for word in overrides]
    with pytest.raises(UserError, match=says) as caught:
        with_base(composed("data.dir=x", f"init_from={base}", *words))
    assert "\n" not in str(caught.value)


def test_what_agrees_and_what_is_free_is_taken(base):
    words = ("model.hidden_size=32", "model.max_positions=64", "model.draft_cell=mlp")
    values = with_base(composed("data.dir=x", f"init_from={base}", *words)).cfg.model
    assert (values.max_positions, values.draft_cell, values.num_layers) == (64, "mlp", 2)


def test_without_a_shape_there_is_one_line(base):
    with pytest.raises(UserError, match=r"model\.hidden_size: .*model=small.*init_from="):
        with_base(composed("data.dir=x"))
    gone = composed("data.dir=x", "init_from=/nowhere", "model=tiny")
    with pytest.raises(UserError, match="init_from: /nowhere does not exist"):
        with_base(gone)
    assert with_base(gone, needed=False).init_from is None  # a plan goes without


def test_a_plan_needs_the_folder_alone(base):
    lengths = ("plan.sequence_length=64", "layout.block_size=4")
    planned = Planned.from_config(composed(f"init_from={base}", *lengths, command="plan"))
    said = config_from_huggingface(base / "config.json")
    assert planned.model.num_parameters == said.num_parameters
    assert planned.train.precision == "fp32"


def test_data_of_another_tokenizer_are_refused_with_both_named(base, data_dir):
    with pytest.raises(UserError, match=r"init_from: .*huggingface tokenizer .*data.*sentenc"):
        check_tokenizer(open_model(base), data_dir)
    huggingface_tokenizer().save(base)
    check_tokenizer(open_model(base), base)
    (base / "tokenizer.json").unlink()
    check_tokenizer(open_model(base), data_dir)  # weights alone are taken at their word


@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_a_base_and_text_suffice(family, tmp_path):
    """Text and a folder become data, a run and an export, whose AR weights are the folder's."""
    base, data, run_dir = tmp_path / "base", tmp_path / "data", tmp_path / "run"
    write_huggingface(base, family, huggingface_tokenizer(), vocab_size=300, **SCALED)
    done = run(
        "data_prep.prepare", f"output_dir={data}", "corpus.max_bytes=60000", "sequence_length=64",
        "tokenizer=huggingface", f"tokenizer.path={base}", "layout.block_size=4",
        "heldout_fraction=0.2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = run(
        "pipeline.train", "experiment=convert", f"init_from={base}", f"data.dir={data}",
        f"run_dir={run_dir}", "steps=2", "global_batch_size=2", "micro_batch_size=2",
        "adapter.rank=2", "model.draft_rank=2", "checkpoint.every=2", "wandb.mode=disabled",
        "layout.block_size=4", "evals.decode_speed.prompt_tokens=8",
        "evals.decode_speed.prompts=1", "evals.decode_speed.max_new_tokens=6",
        "evals.decode_speed.temperatures=[0.0]", "evals.decode_speed.score_sequences=2",
        "evals.decode_speed.methods=[ar,tidar]",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    runs = "the compact transformer" if family == "llama" else "transformers"
    assert f"init_from: {base}, {family} architecture run by {runs}" in done.stdout
    done = run("pipeline.export", f"checkpoint={run_dir}", f"output={tmp_path / 'export'}")
    assert done.returncode == 0, done.stderr
    exported = load_file(tmp_path / "export" / "model.safetensors")
    for name, tensor in load_file(base / "model.safetensors").items():
        assert torch.equal(exported[name][: len(tensor)], tensor), name
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert theirs.config.vocab_size == 301  # the mask token's row
    assert (
        theirs.config.rope_parameters
        == json.loads((base / "config.json").read_text())["rope_parameters"]
    )
