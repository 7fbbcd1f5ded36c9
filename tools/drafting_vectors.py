"""Writes `drafting/`: tiny trained models with a draft head, as exports, and how each decodes.

    PYTHONPATH=.:tests:tests/pipeline/decoding python -m tools.drafting_vectors

What a run must give, step by step, is the decoder's own. Seeds are those at which no decision is so
near that rounding could turn it, as `export_reader` measures it. Needed again
only when the vectors shall cover something new.
"""

import json
import shutil
import tempfile
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from export_reader import Decoder, Export, Settings
from small_models import TEXT, sentencepiece_tokenizer, small_config, write_checkpoint

from data_prep.formats.groups import PackedSequence
from data_prep.layout import build_layout
from pipeline.data.batch import Batch, make_batch
from pipeline.data.windows import draw_windows
from pipeline.decoding import DecodeOptions, Sampling
from pipeline.decoding.engine import StepEngine
from pipeline.decoding.sampling import Uniforms
from pipeline.model.attention import training_mask
from pipeline.model.config import ADAPTER_TARGETS, ModelConfig, block_slots
from pipeline.model.hf_export import GENERATE_FOLDER, write_export
from pipeline.model.loading import open_model, read_model
from pipeline.model.transformer import Transformer

FOLDER = Path(__file__).parent / "drafting"
FILES = ("config.json", "tidar.json", "model.safetensors", "tidar.safetensors")
LETTERS = sorted(set(TEXT[1] + TEXT[4]))
MASK = len(LETTERS)
BLOCK_SIZE = 4
LENGTH = 48
STEPS = 300
NEW = 24
MARGIN = 3e-5
SHAPES: dict[str, dict[str, Any]] = {
    "gru": {
        "family": "qwen3", "num_layers": 2, "draft_rank": 3, "draft_cell": "gru",
        "draft_width": 6, "adapter_rank": 2, "adapter_targets": ADAPTER_TARGETS,
        "own_mask_embedding": True,
    },
    "causal": {
        "family": "qwen2", "num_layers": 2, "draft_rank": 3, "draft_cell": "linear",
        "causal_slots": True, "tie_embeddings": False,
    },
    "one_block": {
        "family": "llama", "num_layers": 1, "draft_rank": 3, "draft_cell": "mlp",
        "draft_width": 10, "adapter_rank": 1, "adapter_targets": ("v_proj", "down_proj"),
        "linear_drafts": True,
    },
}  # fmt: skip
DRAWN: dict[str, Any] = {"temperature": 1.0}
SHARP: dict[str, Any] = {
    "temperature": 0.8, "top_k": 12, "top_p": 0.95, "repetition_penalty": 1.3
}  # fmt: skip
ALL: list[int] = [1, 2, 3, 4]
NONE: list[int] = []
RUNS: dict[str, list[tuple[dict[str, Any], int, list[int]]]] = {
    "gru": [
        ({}, 4, ALL), ({}, 4, [1, 3]), ({}, 4, NONE), ({"repetition_penalty": 1.4}, 4, NONE),
        (DRAWN, 4, ALL), (DRAWN, 4, [2, 3]), (DRAWN, 4, NONE), (DRAWN, 3, [1, 2, 3]),
        (SHARP, 4, ALL), (SHARP, 4, NONE), ({**DRAWN, "trust": 0.5}, 4, ALL),
    ],
    "causal": [
        ({}, 4, ALL), ({}, 4, [1]), (DRAWN, 4, ALL), (DRAWN, 6, NONE), (SHARP, 4, [1, 4]),
    ],
    "one_block": [
        ({}, 4, [1]), ({}, 4, NONE), (DRAWN, 4, [1]), (DRAWN, 5, [1]), (SHARP, 4, [1]),
        ({"trust": 0.6}, 4, [1]),
    ],
}  # fmt: skip
"""Sampling, K and blocks of each run."""


def train(config: ModelConfig) -> Transformer:
    """A model that has learned its few lines fairly well, not by heart; slots and the head too."""
    model = Transformer(config).initialize(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-3)
    texts = [np.array([LETTERS.index(letter) for letter in TEXT[n]]) for n in (1, 4)]
    rng = np.random.default_rng(0)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 8e-3 * (1 - step / STEPS)
        batch = make_batch(
            [sequence(texts[int(rng.integers(2))], config, rng) for _ in range(8)],
            MASK, LENGTH, alone_share=0.5, causal_slots=config.causal_slots,
        )  # fmt: skip
        loss = F.cross_entropy(logits_of(model, batch), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"loss {loss.item():.3f}")
    return model.eval()


def logits_of(model: Transformer, batch: Batch) -> torch.Tensor:
    mask = training_mask(batch.spans, torch.device("cpu"))
    hidden = model.hidden(batch.input_ids, batch.position_ids, mask, clean=LENGTH)
    return model.draft_logits(model.drafts(hidden.flatten(0, 1), batch.blocks), batch.rows)


def sequence(text: np.ndarray, config: ModelConfig, rng: np.random.Generator) -> PackedSequence:
    start = int(rng.integers(len(text) - LENGTH))
    slots = block_slots(BLOCK_SIZE, config.linear_drafts)
    layout = build_layout([LENGTH], slots, shift=True, rng=rng)
    windows = draw_windows(layout, BLOCK_SIZE, rng) if config.linear_drafts else None
    tokens = text[start : start + LENGTH]
    return PackedSequence(tokens, np.array([LENGTH]), layout, windows=windows)


def export(name: str) -> Path:
    """The model's folder, without what another decoder has no use for here."""
    tokenizer, folder = sentencepiece_tokenizer(), FOLDER / name
    sizes = {
        "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "num_kv_heads": 1,
        "vocab_size": MASK + 1, "mask_token_id": MASK, "block_size": BLOCK_SIZE,
    }  # fmt: skip
    model = train(small_config(**{**sizes, **SHAPES[name]}))
    with tempfile.TemporaryDirectory() as temporary:
        source = open_model(write_checkpoint(Path(temporary) / "step", model, tokenizer))
        write_export(model, tokenizer, source, folder)
    shutil.rmtree(folder / GENERATE_FOLDER)
    for path in folder.iterdir():
        if path.name not in FILES:
            path.unlink()
    return folder


def prompt_of(number: int) -> list[int]:
    """A few letters of one of the texts, from another place in each run."""
    text = TEXT[(1, 4)[number % 2]]
    start = 7 * number % 60
    return [LETTERS.index(letter) for letter in text[start : start + 1 + 5 * number % 14]]


@torch.inference_mode()
def run(
    model: Transformer, prompt: list[int], sampling: Sampling, size: int, blocks: list[int]
) -> tuple[int, list[dict[str, Any]]]:
    """The decoder's own steps: d_0, and for each step the draft that it verified, the q of each of
    its tokens where they are drawn, and what it made final behind its d_0."""
    shape = DecodeOptions(sampling=sampling, block_size=size, blocks=blocks).step_shape(model)
    engine = StepEngine(model, sampling, shape, capacity=len(prompt) + NEW + size)
    (first,), _ = engine.admit(0, torch.tensor(prompt), sampling.seed)
    steps, made = [], 1
    while made < NEW:
        step: dict[str, Any] = {"draft": engine.state.drafts[0].tolist()}
        if (q := engine.state.probabilities) is not None:
            own = q[0].gather(1, engine.state.drafts[0][:, None])[:, 0]
            step["q"] = [round(value, 5) for value in own.tolist()]
        steps.append({**step, "made": engine.step()[0]})
        made += len(steps[-1]["made"])
    return first, steps


def case(
    model: Transformer,
    folder: Path,
    number: int,
    options: dict[str, Any],
    size: int,
    blocks: list[int],
) -> dict[str, Any]:
    """A run at the first prompt and seed at which nothing is decided by a hair."""
    for attempt in count():
        prompt = prompt_of(number + 11 * attempt)
        sampling = Sampling(seed=number + attempt, **options)
        first, steps = run(model, prompt, sampling, size, blocks)
        numbers: dict[str, list[float]] = {"verify": [], "draft": []}
        if not sampling.greedy:
            rounds = len(steps)
            numbers["verify"] = rounded(Uniforms(sampling, 0).take(1 + size * rounds))
            numbers["draft"] = rounded(Uniforms(sampling, 1).take((size - 1) * (rounds + 1)))
        other = Decoder(Export(folder), Settings(**options), size, blocks, *numbers.values())
        agrees = first == other.start(prompt) and all(
            (step["draft"], step["made"]) == (other.draft, other.step()) for step in steps
        )
        if other.margin > MARGIN:
            break
    assert agrees, f"{folder.name}, {options}: export_reader decodes something else"
    accepted = [len(step["made"]) for step in steps]
    print(folder.name, options, size, blocks, accepted, f"{other.margin:.1e}")
    return {
        "sampling": options, "block_size": size, "blocks": blocks, "seed": sampling.seed,
        "prompt": prompt, "first": first, "steps": steps, "numbers": numbers,
    }  # fmt: skip


def rounded(numbers: torch.Tensor) -> list[float]:
    """Far below `MARGIN`, so that they decide as the whole ones do."""
    return [round(number, 7) for number in numbers.tolist()]


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    for name, runs in RUNS.items():
        folder = export(name)
        model = read_model(open_model(folder), device="cpu")
        cases = [case(model, folder, n, *given) for n, given in enumerate(runs)]
        lines = ",\n".join(json.dumps(one, separators=(",", ":")) for one in cases)
        (folder / "vectors.json").write_text(f"[{lines}]\n")


if __name__ == "__main__":
    main()
