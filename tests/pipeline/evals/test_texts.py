"""Likelihood by source: the same figures as for each source alone, and as for the split."""

import json
import math

import pytest
import torch
from evals_data import BLOCK_SIZE, SEQUENCE_LENGTH, OneRank, make_model, model_config

from pipeline.evals.config import LikelihoodConfig
from pipeline.evals.likelihood import evaluate_likelihood, read_texts
from tidar_common.errors import UserError

ROWS = (
    {"text": "the quick brown fox", "source": "prose"},
    {"text": "def return self\n" * 30, "source": "code"},
    {"text": "lazy dogs jumps over", "source": "prose"},
    {"text": "été"},
)


def write(path, *rows: dict) -> str:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return str(path)


@torch.no_grad()
def test_each_source_has_its_own_figures(data, tmp_path):
    """Against loops over texts, pieces, blocks and tokens."""
    model, tokenizer = make_model(model_config(data.tokenizer), scale=3.0), data.tokenizer
    config = LikelihoodConfig(texts_file=write(tmp_path / "texts.jsonl", *ROWS), sequences=1)
    found = evaluate_likelihood(model, tokenizer, data.heldout, config, OneRank())["by_source"]
    assert list(found) == ["prose", "code", "text"]
    costs = -torch.from_numpy(data.heldout.unigram().probabilities).log()
    for source, own in found.items():
        ar, masked, first, pieces = [], [], 0.0, 0
        for row in ROWS:
            if row.get("source", "text") != source:
                continue
            ids = [*tokenizer.encode(row["text"]), tokenizer.eos_id]
            for start in range(0, len(ids), SEQUENCE_LENGTH):
                piece = ids[start : start + SEQUENCE_LENGTH]
                pieces += 1
                first += float(costs[piece[0]])
                logits = torch.log_softmax(model(torch.tensor([piece]))[0].double(), -1)
                ar += [-float(logits[n, token]) for n, token in enumerate(piece[1:])]
                for begin in range(0, len(piece), BLOCK_SIZE):
                    block = piece[begin : begin + BLOCK_SIZE]
                    total = begin + len(block)
                    mask = torch.ones(total, total, dtype=torch.bool).tril()
                    mask[begin:] = True
                    drafted = piece[:begin] + [tokenizer.mask_id] * len(block)
                    rows = model(torch.tensor([drafted]), mask=mask)[0, begin:].double()
                    rows = torch.log_softmax(rows, -1)
                    masked += [-float(rows[n, token]) for n, token in enumerate(block)]
        size = own["text_bytes"]
        assert own["documents"] == pieces
        assert size == sum(
            len(row["text"].encode()) for row in ROWS if row.get("source", "text") == source
        )
        assert own["perplexity"] == pytest.approx(math.exp(sum(ar) / len(ar)), rel=1e-4)
        bits = (sum(ar) + first) / math.log(2) / size
        assert own["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
        bits = sum(masked) / math.log(2) / size
        assert own["diffusion_bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert found["code"]["documents"] > 1


def test_without_a_file_there_are_no_sources(data):
    model = make_model(model_config(data.tokenizer))
    config = LikelihoodConfig(sequences=1)
    found = evaluate_likelihood(model, data.tokenizer, data.heldout, config, OneRank())
    assert found["by_source"] is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no text"),
        ('{"text": "a"}\n{"source": "b"}', ':2: "text" must be there'),
        ("[1]", ":1: not a JSON object"),
        ('{"text": 5}', ':1: "text" must be there, and be a text'),
    ],
)
def test_a_bad_file_is_named(data, tmp_path, content, message):
    path = tmp_path / "texts.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_texts(path, data.tokenizer, 10, 4)
    with pytest.raises(UserError, match="is not a file of UTF-8 text"):
        read_texts(tmp_path / "gone.jsonl", data.tokenizer, 10, 4)
