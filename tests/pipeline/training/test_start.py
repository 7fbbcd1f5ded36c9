"""Models as they start: the same weights under every stage, and nowhere the whole model twice."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_models import random_model, small_config, write_checkpoint, write_huggingface
from small_models import sentencepiece_tokenizer as tokenizer
from workers import run_workers

from bench.measure import peak_bytes
from pipeline.distributed import World
from pipeline.model.config import ModelConfig
from pipeline.model.loading import initialize_from, load_into, open_model
from pipeline.model.transformer import Transformer
from pipeline.training.engine import DeepSpeedConfig, OptimizerConfig, build_engine, full_copy
from pipeline.training.setup import allocate, build_model
from tidar_common.errors import UserError

LARGE = ModelConfig(
    hidden_size=512, intermediate_size=1024, num_layers=12, num_heads=8, num_kv_heads=2,
    head_dim=64, vocab_size=1000, mask_token_id=3, block_size=4,
)  # fmt: skip


def settings(stage: int, precision: str = "fp32", init_from: Path | None = None) -> SimpleNamespace:
    """What building a model takes of a run's settings."""
    return SimpleNamespace(
        init_from=init_from, data_dir=init_from, freeze_base=False, seed=5, precision=precision,
        micro_batch_size=1,
        deepspeed=DeepSpeedConfig(stage), optimizer=OptimizerConfig(),
        activation_checkpointing="none", compile="auto", accumulation_steps=lambda world_size: 1,
    )  # fmt: skip


def measure(stage: int, world: World) -> tuple[int, int]:
    """The most bytes in tensors while a model is allocated, and, on top, while it is drawn."""
    built: list = []
    allocated = peak_bytes(
        lambda: built.append(allocate(settings(stage), LARGE, world)), world.device
    )
    model, opened = built[0]
    return allocated, peak_bytes(lambda: model.initialize(0, opened), world.device)


def start_all(world: World, folder: Path, small: ModelConfig) -> dict:
    found: dict = {"said": []}
    for precision in ("fp32", "bf16"):
        for stage in (1, 3):
            for name in ("drawn", "read"):
                chosen = settings(stage, precision, folder if name == "read" else None)
                model = build_model(chosen, small, world, found["said"].append)
                engine = build_engine(
                    model, world, optimizer=chosen.optimizer, config=chosen.deepspeed,
                    precision=precision, micro_batch_size=1, accumulation_steps=1,
                )  # fmt: skip
                groups = engine.optimizer.param_groups
                found[precision, stage, name] = full_copy(engine, small).state_dict(), len(groups)
    for stage in (1, 3):
        found["allocated", stage], found["filled", stage] = measure(stage, world)
    return found


@pytest.fixture(scope="module")
def small() -> ModelConfig:
    """Like the folder's model, with rows for a mask token and some to spare."""
    return small_config("qwen3", tie_embeddings=True, mask_token_id=331, vocab_size=337)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("base") / "model"
    write_huggingface(path, "qwen3", tokenizer(), tie_word_embeddings=True)
    return path


@pytest.fixture(scope="module")
def started(tmp_path_factory, folder, small) -> list[dict]:
    return run_workers(start_all, 2, tmp_path_factory.mktemp("world"), folder, small)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("name", ["drawn", "read"])
def test_all_stages_start_from_the_same_weights(started, folder, small, precision, stage, name):
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    expected = Transformer(small).initialize(5).to(dtype)
    if name == "read":
        expected = initialize_from(folder, small, dtype)
    for found in started:
        weights, groups = found[precision, stage, name]
        assert groups == 2
        for key, value in expected.state_dict().items():
            assert weights[key].dtype == dtype
            assert torch.equal(weights[key], value), key


def test_no_rank_holds_the_whole_model_twice(started):
    """Tensors alive at once: while the model is allocated, and, on top, while it is filled."""
    whole = 4 * LARGE.num_parameters
    largest = 4 * LARGE.hidden_size * LARGE.intermediate_size
    for found in started:
        # Both ends of the tied matrix exist for a moment.
        assert found["allocated", 1] == whole + 4 * LARGE.num_embeddings * LARGE.hidden_size
        assert found["filled", 1] <= 2.1 * largest
        # Its half, and what DeepSpeed cut up but Python's collector has not yet let go.
        assert whole / 2 <= found["allocated", 3] < 0.85 * whole
        # Gathering and cutting up again takes some copies of the one at hand. How many are alive
        # at once depends on Python's collector; a second whole model would be far above.
        assert largest <= found["filled", 3] < 0.5 * whole


def test_the_mask_embedding_is_reported_once_a_start(started):
    said = [[line for line in found["said"] if "mask token" in line] for found in started]
    assert [len(lines) for lines in said] == [4, 2]  # rank 0 alone writes in stage 3
    assert "mask token 331: embedding with norm" in said[0][0]


def test_a_mask_embedding_of_nothing_is_refused(tmp_path):
    config = small_config(mask_token_id=4)
    model = random_model(config)
    with torch.no_grad():
        model.model.embed_tokens.weight[4] = 0
    path = write_checkpoint(tmp_path / "zero", model, tokenizer())
    with pytest.raises(UserError, match="embedding of mask token 4 is next to nothing"):
        initialize_from(path, config)


def test_values_that_are_not_finite_are_refused(tmp_path):
    config = small_config()
    model = random_model(config)
    with torch.no_grad():
        model.model.norm.weight[1] = float("nan")
    path = write_checkpoint(tmp_path / "nan", model, tokenizer())
    with pytest.raises(UserError, match=r"model\.norm\.weight holds values that are not finite"):
        initialize_from(path, config)


def test_a_process_that_does_not_write_reads_nothing(folder, small):
    from contextlib import contextmanager

    @contextmanager
    def closed(parameter):
        yield False

    source = open_model(folder)

    def refuse():
        raise AssertionError("read")

    def unreadable(dtype):
        for weight in source.weights(dtype):
            yield replace(weight, read=refuse)

    model = Transformer(small).initialize(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert load_into(model, replace(source, weights=unreadable), closed) is None
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_parameters_on_the_host_need_stage_3():
    with pytest.raises(ValueError, match="offload_parameters needs stage 3"):
        DeepSpeedConfig(stage=2, offload_parameters=True)
