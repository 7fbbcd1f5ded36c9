"""`tidar-train` with a frozen base, under every ZeRO stage: what learns, and what stays."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import SMALL_RUN
from hydra import compose, initialize_config_dir
from small_models import random_model, small_config, write_checkpoint
from workers import run_workers

from data_prep.formats.manifest import Manifest
from data_prep.tokenizers.load import load_tokenizer
from pipeline import load_model
from pipeline.checkpoint.write import completed, differences, refuse_changes
from pipeline.decoding import generate
from pipeline.distributed import World
from pipeline.model.parameters import is_adapter, is_drafting
from pipeline.objective.loss import ObjectiveConfig
from pipeline.train import train_in_world
from pipeline.training.engine import OptimizerConfig, parameter_groups, set_learning_rate
from pipeline.training.guards.ar_guard import read_base
from pipeline.training.launch.run_dir import owned
from pipeline.training.launch.signals import StopRequest
from pipeline.training.settings import TrainSettings, run_identity
from pipeline.training.setup import model_config
from tidar_common.cli import config_dir
from tidar_common.errors import UserError

CASES = ("fp32-0", "fp32-1", "fp32-2", "fp32-3", "bf16-1", "bf16-3")
PUBLISHED = ObjectiveConfig()
RESUMED = ("fp32-0", "fp32-3", "bf16-1")
SHAPE = (
    "model.hidden_size=32", "model.intermediate_size=48", "model.num_layers=2",
    "model.num_heads=4", "model.num_kv_heads=2", "model.head_dim=8", "model.max_positions=256",
    "model.rope_theta=5000",
)  # fmt: skip
FROZEN = (*SMALL_RUN, *SHAPE, "freeze_base=true", "steps=4", "checkpoint.every=2",
          "adapter.rank=2", "adapter.targets=[v_proj,o_proj,up_proj]", "model.draft_rank=2",
          "optimizer.draft_learning_rate=0.02", "wandb.mode=disabled",
          "evals.decode_speed.prompts=1", "evals.decode_speed.temperatures=[0.0]")  # fmt: skip


def settings_of(*overrides: str) -> TrainSettings:
    with initialize_config_dir(str(config_dir()), version_base=None):
        return TrainSettings.from_config(compose("train", [*FROZEN, *overrides]))


def train_all(world: World, data_dir: Path, base: Path, folder: Path) -> dict[str, list[int]]:
    """Every case to its end, and of some the last two steps once more from a checkpoint; how many
    elements have a state in the optimizer, by case and file."""
    counts = {}
    for case in CASES:
        precision, stage = case.split("-")
        names = (case, f"{case}-again") if case in RESUMED else (case,)
        for run_dir in (folder / name for name in names):
            if world.is_main and run_dir.name.endswith("-again"):
                shutil.copytree(folder / case, run_dir)
                shutil.rmtree(run_dir / "checkpoints" / "step-00000004")
                (run_dir / "checkpoints" / "latest").write_text("step-00000002\n")
            world.barrier()
            settings = settings_of(
                f"data.dir={data_dir}", f"init_from={base}", f"run_dir={run_dir}",
                f"precision={precision}", f"deepspeed=zero{stage}",
            )  # fmt: skip
            with owned(run_dir, settings.resolved, world, print):
                assert train_in_world(settings, world, StopRequest(), lambda text: None) == 0
        counts[case] = [stored_elements(path) for path in optimizer_files(folder / case)]
    return counts


def optimizer_files(run_dir: Path) -> list[Path]:
    folder = run_dir / "checkpoints" / "step-00000004"
    return sorted(folder.glob("*_optim_states.pt")) or sorted(folder.glob("*_model_states.pt"))


def stored_elements(path: Path) -> int:
    """Elements of Adam's first moment in a file."""
    found = 0

    def visit(value: object, name: object) -> None:
        nonlocal found
        if isinstance(value, dict):
            for key, inner in value.items():
                visit(inner, key)
        elif isinstance(value, list | tuple):
            for inner in value:
                visit(inner, name)
        elif isinstance(value, torch.Tensor) and name == "exp_avg":
            found += value.numel()

    visit(torch.load(path, weights_only=False), None)
    return found


@pytest.fixture(scope="module")
def base(data_dir, tmp_path_factory) -> Path:
    """A model that was never trained to draft, whose last token is the data's mask token."""
    tokenizer = Manifest.load(data_dir).tokenizer
    config = small_config(vocab_size=tokenizer.vocab_size).without_drafting()
    path = tmp_path_factory.mktemp("base") / "model"
    return write_checkpoint(path, random_model(config, 4), load_tokenizer(data_dir))


@pytest.fixture(scope="module")
def runs(data_dir, base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return folder, run_workers(
        train_all, 2, tmp_path_factory.mktemp("world"), data_dir, base, folder
    )


@pytest.mark.parametrize("case", CASES)
def test_the_ar_half_is_the_base_bit_for_bit(runs, base, case):
    dtype = "bf16" if case.startswith("bf16") else "fp32"
    before, tokenizer = load_model(base, dtype=dtype, device="cpu")
    after, _ = load_model(runs[0] / case, dtype=dtype, device="cpu")
    trained = after.state_dict()
    for name, weight in before.state_dict().items():
        assert torch.equal(weight, trained.pop(name)), name
    assert all(map(is_drafting, trained))
    for name, weight in trained.items():  # what starts at zero has moved
        assert weight.any() or name == "draft_head.no_slot", name
    ids = torch.randint(0, before.config.vocab_size, (3, 50))
    assert torch.equal(before(ids), after(ids))
    prompt = tokenizer.encode("def add(left, right):")
    text = generate(before, prompt, max_new_tokens=24, method="ar").tokens
    assert generate(after, prompt, max_new_tokens=24, method="ar").tokens == text
    if dtype == "fp32":
        assert generate(after, prompt, max_new_tokens=24, method="tidar").tokens == text


@pytest.mark.parametrize("case", CASES)
def test_only_what_drafts_has_a_state(runs, case):
    folder, counts = runs
    config = load_model(folder / case, device="cpu")[0].config
    least, stage = config.num_drafting_parameters, case[-1]
    for found in (result[case] for result in counts):
        stored = found[0] if stage == "0" else sum(found)
        assert least <= stored <= least + 64  # padding of partitions


@pytest.mark.parametrize("case", RESUMED)
def test_it_resumes_exactly(runs, case):
    straight, again = (
        load_model(runs[0] / name, device="cpu")[0].state_dict() for name in (case, f"{case}-again")
    )
    for name, weight in straight.items():
        assert torch.equal(weight, again[name]), name


@pytest.mark.parametrize("case", CASES)
def test_it_learns_and_reports_the_bases_ar_loss(runs, case):
    folder = runs[0]
    rows = [json.loads(line) for line in (folder / case / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["loss_diffusion"] < rows[0]["loss_diffusion"] - 0.1
    rho = PUBLISHED.alone_weight
    for row in rows:  # the AR term is left out
        drafts = (row["loss_diffusion"] + rho * row["loss_alone"]) / (1 + rho)
        assert row["loss"] == pytest.approx(drafts, rel=1e-5)
    assert all(row["loss_ar"] > 0 for row in rows)
    evals = (folder / case / "evals" / "decode_speed.jsonl").read_text().splitlines()
    start = read_base(folder / case)
    losses = [json.loads(line)["ar_loss"] for line in evals]
    assert len(set(losses)) == 1
    # Measured before without slots, whose rows change how sums are rounded.
    assert losses[0] == pytest.approx(start, rel=1e-6)


def test_fp32_takes_masters_of_what_learns_and_the_base_as_it_is(runs):
    short, _ = load_model(runs[0] / "bf16-1", device="cpu")
    long, _ = load_model(runs[0] / "bf16-1", dtype="fp32", device="cpu")
    for name, weight in short.state_dict().items():
        own = long.state_dict()[name]
        assert torch.equal(own.bfloat16(), weight), name
        if is_adapter(name):
            assert not torch.equal(own, weight.float()), name


def test_the_rate_of_what_drafts_is_its_own(runs, data_dir, base):
    model = random_model(small_config(adapter_rank=2, adapter_targets=("o_proj",), draft_rank=2))
    groups = parameter_groups(model, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    drafting = [[is_drafting(names[id(p)]) for p in group["params"]] for group in groups]
    assert [(all(own), any(own)) for own in drafting] == [(False, False)] * 2 + [(True, True)]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.0]
    assert sum(map(len, drafting)) == len(names)
    assert len(parameter_groups(random_model(small_config()), 0.1)) == 2
    assert OptimizerConfig(learning_rate=0.01, draft_learning_rate=0.02).draft_rate_scale == 2
    engine = SimpleNamespace(
        optimizer=SimpleNamespace(param_groups=[{}, {}]), rate_scales=[1.0, 2.0]
    )
    set_learning_rate(engine, 0.3)
    assert engine.optimizer.param_groups == [{"lr": 0.3}, {"lr": 0.6}]


def test_another_adapter_is_another_run(runs, data_dir, base):
    state = runs[0] / "fp32-1" / "checkpoints" / "step-00000004" / "state.json"
    saved = json.loads(state.read_text())["identity"]
    common = (f"data.dir={data_dir}", f"init_from={base}", "run_dir=x", "precision=fp32")

    def changed(*overrides: str) -> dict:
        settings = settings_of(*common, *overrides)
        asked = json.loads(json.dumps(run_identity(settings, model_config(settings))))
        return differences(completed(saved, asked), asked)

    assert changed() == {}
    with pytest.raises(
        UserError, match=r"made with model\.adapter_rank=2, .* model\.adapter_rank=3"
    ):
        refuse_changes("step-00000004", changed("adapter.rank=3"), [])
    assert set(changed("freeze_base=false")) == {"freeze_base", "model.own_mask_embedding"}
    # Runs from before there were adapters go on.
    for key in [k for k in saved if k.startswith(("model.adapter", "model.own_mask", "freeze"))]:
        del saved[key]
    assert changed("adapter.rank=0", "freeze_base=false") == {}


def test_stages_agree(runs):
    """A half of the batch on each rank under every stage: the same losses but for rounding."""
    losses = {}
    for case in CASES:
        lines = (runs[0] / case / "metrics.jsonl").read_text().splitlines()
        losses[case] = [json.loads(line)["loss"] for line in lines]
    for case in CASES:
        close = 2e-4 if case.startswith("fp32") else 0.02
        assert losses[case] == pytest.approx(losses["fp32-0"], rel=close), case


def test_mistakes(data_dir, base, runs):
    def refuse(match: str, *overrides: str) -> None:
        with pytest.raises(UserError, match=match) as caught:
            settings_of(f"data.dir={data_dir}", "run_dir=x", *overrides)
        assert "\n" not in str(caught.value)

    refuse("freeze_base: there is no base without init_from")
    refuse("freeze_base: objective=ar has nothing to train", f"init_from={base}", "objective=ar")
    refuse(r"adapter: targets: no projection 'head'; known are q_proj", "adapter.targets=[head]")
    refuse("adapter: rank must be 0", "adapter.rank=-1")
    refuse(
        "adapter.own_mask_embedding: a frozen base",
        "adapter.own_mask_embedding=false", f"init_from={base}",
    )  # fmt: skip
    settings = settings_of(
        f"data.dir={data_dir}", "run_dir=x", f"init_from={base}", "adapter.rank=0"
    )
    assert settings.model.adapter_targets == ()
    assert settings.model.own_mask_embedding
