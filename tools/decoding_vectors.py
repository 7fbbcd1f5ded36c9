"""Writes `decoding/`: a tiny trained model as an export, and what decoding it must give.

    PYTHONPATH=.:tests python -m tools.decoding_vectors

Expected tokens are those of plain full forwards, without cache or drafts; forwards and accepted
counts are the decoder's own. Needed again only when the vectors shall cover something new.
"""

import json
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from small_models import TEXT, sentencepiece_tokenizer, small_config, write_checkpoint

from data_prep.formats.groups import PackedSequence
from data_prep.layout import build_layout
from data_prep.tokenizers.load import Tokenizer
from pipeline.data.batch import make_batch
from pipeline.decoding import generate
from pipeline.decoding.sampling import draw, verify
from pipeline.model.attention import training_mask
from pipeline.model.hf_export import GENERATE_FOLDER, write_export
from pipeline.model.loading import open_model, read_model
from pipeline.model.transformer import Transformer
from pipeline.objective.config import ObjectiveConfig
from pipeline.objective.head_loss import head_loss
from pipeline.objective.loss import make_targets

FOLDER = Path(__file__).parent / "decoding"
BLOCK_SIZE = 4
LENGTH = 64
STEPS = 250
PROMPTS = ["def add(left", "The rain in", "for number in range(10):", "x = [1, 2", "We hold"]
SHAPES: tuple[tuple[int, list[int] | None], ...] = ((4, None), (2, None), (8, None), (4, [1, 4]))


def train(tokenizer: Tokenizer) -> Transformer:
    config = small_config(mask_token_id=tokenizer.mask_id, block_size=BLOCK_SIZE)
    model = Transformer(config).initialize(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    texts = [tokenizer.encode(text) for text in TEXT]
    rng = np.random.default_rng(0)
    objective = ObjectiveConfig()
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * (1 - step / STEPS)
        sequences = [sequence(texts[int(rng.integers(len(texts)))], rng) for _ in range(8)]
        batch = make_batch(sequences, tokenizer.mask_id, LENGTH)
        targets = make_targets(batch, objective, batch.ar_labels, float(batch.diffusion_labels))
        loss, _ = model(
            batch.input_ids,
            batch.position_ids,
            training_mask(batch.spans, torch.device("cpu")),
            then=partial(head_loss, targets=targets),
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"loss {loss.item():.3f}")
    return model.eval()


def sequence(text: list[int], rng: np.random.Generator) -> PackedSequence:
    start = int(rng.integers(len(text) - LENGTH))
    layout = build_layout([LENGTH], BLOCK_SIZE, shift=True, rng=rng)
    return PackedSequence(np.array(text[start : start + LENGTH]), np.array([LENGTH]), layout)


@torch.inference_mode()
def plain_continuation(model: Transformer, ids: list[int], count: int) -> tuple[list[int], float]:
    """Greedy tokens from full forwards, and the smallest lead of a token over the next."""
    text, lead = list(ids), float("inf")
    for _ in range(count):
        best = model(torch.tensor([text]))[0, -1].topk(2)
        lead = min(lead, float(best.values[0] - best.values[1]))
        text.append(int(best.indices[0]))
    return text[len(ids) :], lead


def greedy_case(model: Transformer, tokenizer: Tokenizer, prompt: str) -> dict[str, Any]:
    ids, count = tokenizer.encode(prompt), 40
    tokens, lead = plain_continuation(model, ids, count)
    steps = []
    for block_size, blocks in SHAPES:
        run = generate(model, ids, block_size=block_size, blocks=blocks, max_new_tokens=count)
        assert run.tokens == tokens
        steps.append(
            {
                "block_size": block_size,
                "blocks": blocks or list(range(1, block_size + 1)),
                "forwards": run.forwards,
                "accepted": run.accepted,
            }
        )
    return {
        "prompt": prompt, "prompt_ids": ids, "tokens": tokens, "text": tokenizer.decode(tokens),
        "smallest_lead": lead, "steps": steps,
    }  # fmt: skip


def verify_case(seed: int) -> dict[str, Any]:
    """One row of rejection sampling with its random numbers."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.softmax(2 * torch.randn(1, 3, 5, generator=generator), -1)
    q = torch.softmax(p[:, :2].log() + 0.7 * torch.randn(1, 2, 5, generator=generator), -1)
    uniform = torch.rand(1, 5, generator=generator, dtype=torch.float64)
    drafts = draw(q, uniform[:, :2])
    accepted, token = verify(drafts, q, p, uniform[:, 2:])
    return {
        "target": p[0].tolist(), "draft_probabilities": q[0].tolist(), "drafts": drafts[0].tolist(),
        "uniform": uniform[0, 2:].tolist(), "accepted": int(accepted), "token": int(token),
    }  # fmt: skip


def main() -> None:
    torch.manual_seed(0)
    tokenizer = sentencepiece_tokenizer()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    with tempfile.TemporaryDirectory() as folder:
        source = open_model(write_checkpoint(Path(folder) / "step", train(tokenizer), tokenizer))
        model = read_model(source, device="cpu")
        write_export(model, tokenizer, source, FOLDER / "model")
    shutil.rmtree(FOLDER / "model" / GENERATE_FOLDER)
    vectors = {
        "greedy": [greedy_case(model, tokenizer, prompt) for prompt in PROMPTS],
        "verify": [verify_case(seed) for seed in range(12)],
    }
    (FOLDER / "vectors.json").write_text(json.dumps(vectors) + "\n")


if __name__ == "__main__":
    main()
