"""Training checkpoints of every ZeRO stage into one plain model, and weights to start from."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from small_models import (
    edit_json,
    huggingface_tokenizer,
    random_model,
    sentencepiece_tokenizer,
    small_config,
    write_checkpoint,
    write_huggingface,
    write_run,
)
from workers import run_workers

from pipeline import load_model
from pipeline.checkpoint.retention import CheckpointConfig
from pipeline.checkpoint.write import Checkpoints, Saved
from pipeline.data.order import TrainState
from pipeline.distributed import World
from pipeline.model.config import ModelConfig
from pipeline.model.hf_export import write_export
from pipeline.model.loading import initialize_from, open_model
from pipeline.model.parameters import is_adapter
from pipeline.training.engine import (
    DeepSpeedConfig,
    OptimizerConfig,
    build_engine,
    full_copy,
    set_learning_rate,
)
from tidar_common.errors import UserError
from tidar_common.run_files import newest_checkpoint

STAGES = (0, 1, 2, 3)
SAVED = [(precision, stage, True) for precision in ("fp32", "bf16") for stage in STAGES]
SAVED += [("fp32", 3, False), ("bf16", 1, False)]


def saved_config(tied: bool) -> ModelConfig:
    """Sizes that do not divide by two ranks, so that partitions are padded."""
    return small_config(
        "qwen2", tie_embeddings=tied, hidden_size=15, head_dim=6, vocab_size=331, num_layers=1
    )


def save_all(world: World, folder) -> dict:
    """One real step under each stage, saved as training does; the engine's weights of each."""
    weights = {}
    for precision, stage, tied in SAVED:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        config = saved_config(tied)
        engine = build_engine(
            random_model(config).to(dtype).train(),
            world,
            optimizer=OptimizerConfig(),
            config=DeepSpeedConfig(stage=stage),
            precision=precision,
            micro_batch_size=1,
            accumulation_steps=1,
        )
        ids = torch.arange(40)[None] + world.rank
        engine.backward(engine(ids).float().square().mean())
        set_learning_rate(engine, 1e-2)
        engine.step()

        def extra(path, config=config):
            config.save(path / "model.json")
            sentencepiece_tokenizer().save(path)

        run_dir = folder / f"{precision}-{stage}-{tied}"
        state = TrainState(step=3, tokens=80)
        identity, topology = {"precision": precision}, {"deepspeed.stage": stage}
        saving = CheckpointConfig(keep_last=1)
        outcome = Checkpoints(run_dir, world, saving, identity, topology, extra).save(engine, state)
        assert isinstance(outcome, Saved), outcome
        weights[run_dir.name] = full_copy(engine, config).state_dict()
    return weights


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return folder, run_workers(save_all, 2, tmp_path_factory.mktemp("results"), folder)[0]


@pytest.mark.parametrize(("precision", "stage", "tied"), SAVED)
def test_every_stage_loads_into_a_plain_model(saved, precision, stage, tied):
    folder, weights = saved
    name = f"{precision}-{stage}-{tied}"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model, tokenizer = load_model(folder / name, device="cpu")
    assert model.config == saved_config(tied)
    assert tokenizer.content() == sentencepiece_tokenizer().content()
    assert model.state_dict().keys() == weights[name].keys()
    start = random_model(saved_config(tied)).to(dtype).state_dict()
    for key, tensor in model.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, weights[name][key]), key
        assert not torch.equal(tensor, start[key]), f"{key} was not trained"
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp32_takes_the_master_weights(saved, stage):
    folder, weights = saved
    model, _ = load_model(folder / f"bf16-{stage}-True", dtype="fp32", device="cpu")
    state = model.state_dict()
    for key, expected in weights[f"bf16-{stage}-True"].items():
        assert torch.equal(state[key].bfloat16(), expected), key
    finer = [bool((state[k] != w.float()).any()) for k, w in weights[f"bf16-{stage}-True"].items()]
    assert any(finer), "masters hold more than bf16 does"


def test_the_ways_to_name_a_checkpoint(tmp_path):
    model = random_model(small_config())
    run = write_run(tmp_path / "run", model, sentencepiece_tokenizer())
    for path in (run, str(run), run / "checkpoints" / "step-00000007"):
        loaded, _ = load_model(path, device="cpu")
        assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    latest = run / "checkpoints" / "latest"
    for text in ("step-00000009\n", "../../run/checkpoints/step-00000007\n"):  # no name of a folder
        latest.write_text(text)
        assert newest_checkpoint(run) == "step-00000007"
    latest.unlink()
    assert newest_checkpoint(run) == "step-00000007"
    (run / "checkpoints" / "step-00000011").mkdir()
    latest.write_text("step-00000007\n")
    assert newest_checkpoint(run) == "step-00000007"
    latest.unlink()
    with pytest.raises(UserError, match=r"step-00000011.files\.json: missing or damaged"):
        load_model(run)
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"checkpoints: holds no checkpoint yet"):
        load_model(run)


def test_paths_that_hold_no_model(tmp_path):
    with pytest.raises(UserError, match="Qwen/Qwen3: not a folder"):
        load_model("Qwen/Qwen3")
    with pytest.raises(UserError, match="holds no model"):
        load_model(tmp_path)


def test_a_damaged_checkpoint_is_refused_by_the_name_of_its_file(tmp_path):
    folder = write_checkpoint(
        tmp_path / "step", random_model(small_config()), sentencepiece_tokenizer()
    )
    weights = folder / "mp_rank_00_model_states.pt"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"mp_rank_00_model_states.pt"):
        load_model(folder)
    weights.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"mp_rank_00_model_states.pt.*bytes"):
        load_model(folder)
    (folder / "files.json").unlink()
    with pytest.raises(UserError, match=r"files.json"):
        load_model(folder)


def test_a_checkpoint_without_a_tensor_is_refused(tmp_path):
    model = random_model(small_config())
    state = model.state_dict()
    del state["model.layers.0.mlp.up_proj.weight"]
    model.state_dict = lambda: state
    folder = write_checkpoint(tmp_path / "step", model, sentencepiece_tokenizer())
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.up_proj\.weight"):
        load_model(folder)


def test_types_and_devices_that_do_not_exist(tmp_path):
    folder = write_checkpoint(
        tmp_path / "step", random_model(small_config()), sentencepiece_tokenizer()
    )
    with pytest.raises(UserError, match="dtype: unknown value 'fp8'"):
        load_model(folder, dtype="fp8")
    with pytest.raises(UserError, match="device: nowhere"):
        load_model(folder, device="nowhere")
    model, _ = load_model(folder, dtype="bf16", device="cpu")
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_weights_are_read_one_by_one(tmp_path, monkeypatch):
    """No tensor read before is still alive when the next one is."""
    import weakref

    from pipeline.model import huggingface

    write_huggingface(tmp_path, "qwen3", huggingface_tokenizer())
    alive: list[weakref.ref] = []

    def watched(path, name, read=huggingface._tensor):
        assert sum(r() is not None for r in alive) <= 1
        tensor = read(path, name)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(huggingface, "_tensor", watched)
    load_model(tmp_path, device="cpu")
    assert len(alive) > 20


@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_start_at_the_mean(tmp_path, tied):
    theirs = write_huggingface(tmp_path, "qwen3", huggingface_tokenizer(), tie_word_embeddings=tied)
    config = small_config(tie_embeddings=tied, vocab_size=333, mask_token_id=331)
    model = initialize_from(tmp_path, config)
    assert model.config == config
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old, new = theirs.state_dict()[name], model.state_dict()[name]
        assert torch.equal(new[:330], old)
        torch.testing.assert_close(new[330:], old.mean(0).expand(3, -1))
    with torch.no_grad():
        ids = torch.arange(20)[None]
        logits = model(ids)
    torch.testing.assert_close(logits[..., :330], theirs(ids).logits, atol=1e-4, rtol=1e-4)
    mean = logits[..., :330].mean(-1)
    torch.testing.assert_close(logits[..., 331], mean, atol=1e-4, rtol=1e-4)


def test_a_spare_row_becomes_the_mask_of_a_model_that_never_drafted(tmp_path):
    theirs = write_huggingface(tmp_path, "qwen3", huggingface_tokenizer())
    model = initialize_from(tmp_path, small_config(tie_embeddings=False, mask_token_id=301))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old, new = theirs.state_dict()[name].clone(), model.state_dict()[name]
        old[301] = old.mean(0)
        torch.testing.assert_close(new, old, atol=1e-6, rtol=0)
        others = [row for row in range(330) if row != 301]
        assert torch.equal(new[others], old[others])


def test_a_model_that_drafted_keeps_its_mask_row(tmp_path):
    config = small_config()
    source = random_model(config)
    folder = write_checkpoint(tmp_path / "step", source, sentencepiece_tokenizer())
    model = initialize_from(folder, config)
    assert torch.equal(model.lm_head.weight, source.lm_head.weight)
    twin = initialize_from(folder, config.without_drafting())
    assert torch.equal(twin.lm_head.weight, source.lm_head.weight)
    with pytest.raises(UserError, match="mask token 4"):
        initialize_from(folder, small_config(mask_token_id=5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 48}, r"hidden_size 32.*48.*model\.hidden_size=32"),
        ({"num_layers": 3}, r"model\.num_layers=2"),
        ({"tie_embeddings": True}, r"model\.tie_embeddings=false"),
        ({"rope_theta": 1e6}, r"model\.rope_theta=5000"),
        ({"qk_norm": False}, r"model\.qk_norm=true"),
        ({"vocab_size": 300, "mask_token_id": 299}, r"model\.vocab_size=330"),
    ],
)
def test_shapes_that_contradict_the_weights(tmp_path, changes, message):
    write_huggingface(tmp_path, "qwen3", huggingface_tokenizer())
    values = {"tie_embeddings": False, "rms_norm_eps": 1e-6, **changes}
    with pytest.raises(UserError, match=message):
        initialize_from(tmp_path, small_config(**values))


def test_all_three_kinds_start_a_run(tmp_path):
    source = random_model(small_config())
    run = write_run(tmp_path / "run", source, sentencepiece_tokenizer())
    write_export(source, sentencepiece_tokenizer(), open_model(run), tmp_path / "export")
    plain = tmp_path / "plain"
    shutil.copytree(tmp_path / "export", plain)
    (plain / "tidar.json").unlink()
    for path in (run, tmp_path / "export", plain):
        model = initialize_from(path, small_config())
        same = torch.equal(model.lm_head.weight, source.lm_head.weight)
        assert same == (path != plain), "without tidar.json the mask row is new"
        assert torch.equal(model.lm_head.weight[5:], source.lm_head.weight[5:])


def test_what_a_base_lacks_starts_anew_and_what_it_has_is_taken(tmp_path):
    base = random_model(small_config().without_drafting())
    write_checkpoint(tmp_path / "base", base, sentencepiece_tokenizer())
    config = small_config(
        adapter_rank=2, adapter_targets=("q_proj", "down_proj"), own_mask_embedding=True,
        draft_rank=3, vocab_size=332,
    )  # fmt: skip
    model = initialize_from(tmp_path / "base", config)
    ids = torch.arange(40)[None]
    torch.testing.assert_close(model(ids)[..., :330], base(ids))
    for name, weight in base.state_dict().items():  # the mask token's row as well
        assert torch.equal(model.state_dict()[name][: len(weight)], weight), name
    mean = base.model.embed_tokens.weight.mean(0)
    torch.testing.assert_close(model.model.mask_embedding, mean)
    adapters = {n: p for n, p in model.named_parameters() if is_adapter(n)}
    assert len(adapters) == 8
    assert all(p.any() != n.endswith("up.weight") for n, p in adapters.items())

    trained = random_model(config)
    write_checkpoint(tmp_path / "trained", trained, sentencepiece_tokenizer())
    taken = initialize_from(tmp_path / "trained", config)
    for name, weight in trained.state_dict().items():
        assert torch.equal(taken.state_dict()[name], weight), name
    drafter = random_model(small_config())
    write_checkpoint(tmp_path / "drafter", drafter, sentencepiece_tokenizer())
    own = initialize_from(tmp_path / "drafter", config).model.mask_embedding
    assert torch.equal(own, drafter.model.embed_tokens.weight[4])
    twin = initialize_from(tmp_path / "trained", config.without_drafting())
    assert torch.equal(twin(ids), trained(ids))
    for changes, message in (
        ({"adapter_rank": 4}, r"adapter_rank 2, the config has 4; set adapter\.rank=2"),
        ({"adapter_targets": ("q_proj",)}, r"set adapter\.targets=\[q_proj,down_proj\]"),
        ({"adapter_rank": 0}, r"set adapter\.rank=2"),
        ({"own_mask_embedding": False}, r"set adapter\.own_mask_embedding=true"),
        ({"draft_rank": 0}, r"draft_rank 3, .* set model\.draft_rank=3"),
    ):
        with pytest.raises(UserError, match=message):
            initialize_from(tmp_path / "trained", replace(config, **changes))


def test_tidar_json_is_checked(tmp_path):
    write_huggingface(tmp_path, "qwen3", huggingface_tokenizer())
    path = tmp_path / "tidar.json"
    path.write_text(json.dumps({"format_version": 9}))
    with pytest.raises(UserError, match=r"tidar.json: format version 9"):
        load_model(tmp_path)
    edit_json(path, format_version=1, block_size=3)
    with pytest.raises(UserError, match=r"tidar.json: mask_token_id"):
        load_model(tmp_path)
    edit_json(path, mask_token_id=9999)
    with pytest.raises(UserError, match="mask_token_id 9999"):
        load_model(tmp_path)
