"""A small prepared data folder and small models, for tests of evals."""

import importlib.util
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from hydra import compose, initialize_config_dir

from data_prep.config import PrepareSettings
from data_prep.formats.groups import PackedSequence
from data_prep.formats.manifest import Manifest
from data_prep.layout import build_layout
from data_prep.prepare import prepare
from data_prep.tokenizers.load import Tokenizer, load_tokenizer
from pipeline.distributed import World
from pipeline.evals.config import DecodeSpeedConfig, LikelihoodConfig, TasksConfig
from pipeline.evals.decode_speed import evaluate_decode_speed
from pipeline.evals.heldout import HeldOut
from pipeline.evals.likelihood import evaluate_likelihood
from pipeline.evals.tasks import evaluate_tasks
from pipeline.model.config import ModelConfig
from pipeline.model.transformer import Transformer
from tidar_common.cli import config_dir

HAS_LM_EVAL = importlib.util.find_spec("lm_eval") is not None
SEQUENCE_LENGTH = 48
BLOCK_SIZE = 4
DOCUMENTS = 100
WORDS = (
    *("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "def", "return", "self\n"),
    *("été", "木漏れ日", "🙂"),
)
CONFIG = DecodeSpeedConfig(
    prompts=5, prompt_tokens=4, max_new_tokens=13, score_sequences=5, temperatures=[0.0, 1.0, 0.5]
)
FEW = replace(CONFIG, prompts=1, score_sequences=1)
"""Fewer prompts and sequences than ranks."""


def texts() -> dict[str, str]:
    """Text by document id. All are different; every twentieth does not fit into a sequence."""
    rng = random.Random(0)
    sizes = [40 if n % 20 == 0 else rng.randrange(0, 12) for n in range(DOCUMENTS)]
    return {
        f"document-{n}": " ".join([str(n), *rng.choices(WORDS, k=size)])
        for n, size in enumerate(sizes)
    }


def write_data(folder: Path, *changes: str) -> PrepareSettings:
    """Prepare the documents with `tidar-prepare` into `folder/data`; about a third is held out."""
    corpus = folder / "corpus.jsonl"
    lines = [json.dumps({"id": name, "text": text}) for name, text in texts().items()]
    corpus.write_text("\n".join(lines), encoding="utf-8")
    overrides = [
        "corpus=jsonl", f"corpus.path={corpus}", "corpus.id_field=id",
        f"output_dir={folder / 'data'}", f"sequence_length={SEQUENCE_LENGTH}",
        f"layout.block_size={BLOCK_SIZE}", "heldout_fraction=0.35", "tokenizer.vocab_size=310",
        "shard_sequences=8", "group_size=4", *changes,
    ]  # fmt: skip
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("prepare", overrides=overrides)
    assert prepare(cfg) == 0
    return PrepareSettings.from_config(cfg)


def write_tasks(folder: Path) -> Path:
    """A multiple-choice and a generating task for lm-eval, with their data beside them."""
    rows = [
        {"question": "the quick", "choices": [" brown fox", " lazy dogs jumps"], "label": 0},
        {"question": "木漏れ日", "choices": [" over", " def return"], "label": 1},
        {"question": "return", "choices": [" self", " été"], "label": 0},
        {"question": "lazy dogs", "choices": [" 🙂", " the fox"], "label": 1},
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    common = f"""
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder / "rows.jsonl"}
test_split: test
doc_to_text: "{{{{question}}}}"
metadata:
  version: 1.0
"""
    (folder / "choice.yaml").write_text(
        f"""task: local_choice{common}
output_type: multiple_choice
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""
    )
    (folder / "answer.yaml").write_text(
        f"""task: local_answer{common}
output_type: generate_until
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs:
  until: ["o"]
  max_gen_toks: 10
metric_list:
  - metric: exact_match
"""
    )
    return folder


def local_tasks(folder: Path) -> TasksConfig:
    """Settings for the tasks that `write_tasks` wrote."""
    return TasksConfig(
        tasks=["local_choice", "local_answer"],
        tasks_dir=str(folder),
        batch_size=3,
        decoders=["ar", "tidar", "tidar_diffusion"],
    )


def model_config(tokenizer: Tokenizer, **changes) -> ModelConfig:
    values = {
        "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4,
        "num_kv_heads": 2, "head_dim": 8, "vocab_size": tokenizer.vocab_size,
        "mask_token_id": tokenizer.mask_id, "block_size": BLOCK_SIZE, "qk_norm": True,
        "max_positions": 128, **changes,
    }  # fmt: skip
    return ModelConfig(**values)


def make_model(config: ModelConfig, seed: int = 0, scale: float = 6.0) -> Transformer:
    """Random weights whose logits are spread out enough to tell tokens apart."""
    model = Transformer(config).initialize(seed).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    return model


def make_flat_model(config: ModelConfig) -> Transformer:
    """All tokens alike: draft and verifier always agree, and greedy decoding repeats token 0."""
    model = Transformer(config).initialize(0).eval()
    with torch.no_grad():
        model.model.norm.weight.zero_()
    return model


def make_sequence(
    lengths: list[int], padding: int, block_size: int, vocabulary: int, seed: int, *, shift: bool
) -> PackedSequence:
    """A packed sequence of random tokens below `vocabulary`, laid out with full coverage."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocabulary, size=sum(lengths) + padding)
    documents = np.array([*lengths, padding] if padding else lengths)
    layout = build_layout(lengths, block_size, shift=shift, rng=rng)
    return PackedSequence(tokens, documents, layout, padding=padding)


class OneRank:
    """A world of one, without processes."""

    rank, size, is_main = 0, 1, True
    device = torch.device("cpu")

    def gather(self, value):
        return [value]

    def from_main(self, value):
        return value

    def barrier(self) -> None:
        pass


def evaluate_on_ranks(world: World, folder: str, tasks_dir: str) -> dict:
    """Evals of the data folder with a random model, each whole and with little to share out."""
    tokenizer = load_tokenizer(Path(folder))
    heldout = HeldOut(Path(folder), Manifest.load(Path(folder)))
    model = make_model(model_config(tokenizer))
    return {
        "decode_speed": [
            evaluate_decode_speed(model, heldout, config, world, 7) for config in (CONFIG, FEW)
        ],
        "likelihood": [
            evaluate_likelihood(model, tokenizer, heldout, LikelihoodConfig(sequences=n), world)
            for n in (None, 1)
        ],
        "tasks": evaluate_tasks(model, tokenizer, local_tasks(Path(tasks_dir)), world)
        if HAS_LM_EVAL
        else None,
    }
