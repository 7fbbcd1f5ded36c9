"""The adapter against lm-eval's own Hugging Face model, on an exported checkpoint."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from evals_data import OneRank
from small_models import random_model, sentencepiece_tokenizer, small_config, write_checkpoint

from pipeline import load_model
from pipeline.evals.config import TasksConfig
from pipeline.evals.decoders import Decoder
from pipeline.model.hf_export import write_export
from pipeline.model.loading import open_model, read_model

MISSING = [name for name in ("lm_eval", "accelerate") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"the extra `eval` lacks {MISSING}")
CONFIG = TasksConfig(tasks=["unused"], batch_size=3)
TEXTS = (
    "def add(left, right):\n    return left + right",
    "The rain in Spain stays mainly in the plain",
    "for number in range(10):\n    if number % 2 == 0:",
)
PAIRS = (
    (TEXTS[0], "\n\nclass Sum:"), (TEXTS[1], " and the train stays late"), (TEXTS[2], " 加算 🙂"),
    ("x", " = [1, 2, 3]"),
)  # fmt: skip


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> SimpleNamespace:
    """The adapter on the export, and lm-eval's own model on the same folder."""
    from lm_eval.models.huggingface import HFLM

    from pipeline.evals.lm_eval_model import TidarLM

    folder = tmp_path_factory.mktemp("parity")
    tokenizer = sentencepiece_tokenizer()
    trained = random_model(small_config(tie_embeddings=False))
    # No stray bytes: the two libraries write what is not UTF-8 in different ways.
    pieces = [tokenizer.decode([piece]) for piece in range(tokenizer.vocab_size)]
    odd = [
        number for number, text in enumerate(pieces) if not text.isprintable() or "\ufffd" in text
    ]
    with torch.no_grad():
        trained.lm_head.weight[odd] = 0.0
    write_checkpoint(folder / "step", trained, tokenizer)
    source = open_model(folder / "step")
    model = read_model(source, dtype=None, device="cpu")
    write_export(model, source.tokenizer(), source, folder / "export")
    ours, tokenizer = load_model(folder / "export", dtype=torch.float32, device="cpu")
    theirs = HFLM(
        pretrained=str(folder / "export"), device="cpu", dtype="float32", batch_size=1,
        prefix_token_id=tokenizer.eos_id,
    )  # fmt: skip
    adapters = {
        method: TidarLM(ours, tokenizer, CONFIG, Decoder(method, method, 1.0), OneRank())
        for method in ("ar", "tidar")
    }
    return SimpleNamespace(ours=adapters, theirs=theirs)


def requests(kind: str, *arguments: tuple) -> list:
    from lm_eval.api.instance import Instance

    return [
        Instance(kind, {}, args, number, metadata=("local", number, 1))
        for number, args in enumerate(arguments)
    ]


def test_log_likelihoods_are_theirs(both):
    ours = both.ours["tidar"].loglikelihood(requests("loglikelihood", *PAIRS))
    theirs = both.theirs.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True)
    for (value, greedy), (expected, expected_greedy) in zip(ours, theirs, strict=True):
        assert value == pytest.approx(expected, abs=1e-4)
        assert greedy == expected_greedy
    assert len({round(value, 3) for value, _ in ours}) == len(PAIRS)


def test_whole_texts_score_as_theirs(both):
    """Longer than the model's positions as well: windows are cut at the same places."""
    texts = [(text,) for text in (*TEXTS, TEXTS[0] * 40)]
    ours = both.ours["tidar"].loglikelihood_rolling(requests("loglikelihood_rolling", *texts))
    theirs = both.theirs.loglikelihood_rolling(
        requests("loglikelihood_rolling", *texts), disable_tqdm=True
    )
    assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-4)


@pytest.mark.parametrize("method", ["ar", "tidar"])
def test_greedy_generations_are_theirs(both, method):
    options = {"until": ["\n\n", "q"], "do_sample": False, "max_gen_toks": 24}
    arguments = [(text, options) for text in TEXTS]
    ours = both.ours[method].generate_until(requests("generate_until", *arguments))
    theirs = both.theirs.generate_until(requests("generate_until", *arguments), disable_tqdm=True)
    assert ours == theirs
    assert len(set(ours)) == len(TEXTS)
    assert max(map(len, ours)) > 10
