"""Tasks through lm-eval: log probabilities and answers against the model's own forwards."""

import json
import math
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from evals_data import HAS_LM_EVAL, OneRank, local_tasks, make_model, model_config

from pipeline.decoding import generate
from pipeline.evals.config import TasksConfig
from pipeline.evals.decoders import Decoder
from pipeline.evals.tasks import evaluate_tasks, task_rows
from pipeline.evals.totals import Cost
from tidar_common.errors import UserError

CONFIG = TasksConfig(tasks=["local_choice"], batch_size=3, max_new_tokens=12)
needs_lm_eval = pytest.mark.skipif(not HAS_LM_EVAL, reason="the extra `eval` is not installed")


@pytest.fixture(scope="module")
def model(data):
    return make_model(model_config(data.tokenizer), scale=4.0)


def test_without_lm_eval_the_remedy_is_named(data, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'tidar-pretrain\[eval\]'"):
        evaluate_tasks(model, data.tokenizer, CONFIG, OneRank())


def test_a_twin_cannot_draft_answers(data):
    twin = make_model(model_config(data.tokenizer).without_drafting())
    with pytest.raises(UserError, match=r"evals\.tasks\.decoders=\[ar\]"):
        evaluate_tasks(twin, data.tokenizer, CONFIG, OneRank())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": []}, "tasks is empty"),
        ({"decoders": ["beam"]}, "decoders must be different ones of ar"),
        ({"trust": 1.0}, "trust must be in"),
        ({"tasks_dir": "/no/such/folder"}, "is not a folder"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"num_fewshot": -1}, "num_fewshot must be at least 0"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)


def test_rows_for_the_table():
    cost = partial(Cost, answers=1, tokens=6)
    results = {
        "results": {
            "a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": "N/A"},
            "b": {"alias": "b", "exact_match,strict": 0.25},
        },
        "decoders": {
            "ar": {
                "results": {"b": {"exact_match,strict": 0.25}},
                "generation": {
                    "b": cost(forwards=6, seconds=2.0, fourgrams=3, distinct_fourgrams=2).rates()
                },
            },
            "tidar_diffusion": {
                "results": {"b": {"exact_match,strict": 0.5}},
                "generation": {"b": cost(forwards=3, seconds=1.5).rates()},
            },
        },
    }
    speeds = ("tokens_per_forward", "tokens_per_second", "distinct_4grams")
    assert task_rows(results) == [
        {"task": "a", "acc": 0.5},
        {"task": "b", "decoder": "ar", "exact_match,strict": 0.25}
        | dict(zip(speeds, (1.0, 3.0, 2 / 3), strict=True)),
        {"task": "b", "decoder": "tidar_diffusion", "exact_match,strict": 0.5}
        | dict(zip(speeds, (2.0, 4.0, None), strict=True)),
    ]


def log_probability(model, context: list[int], target: list[int]) -> tuple[float, bool]:
    """One causal forward a token."""
    total, greedy = 0.0, True
    for n, token in enumerate(target):
        with torch.no_grad():
            logits = model(torch.tensor([context + target[:n]]))[0, -1].double()
        total += float(torch.log_softmax(logits, -1)[token])
        greedy &= int(logits.argmax()) == token
    return total, greedy


@needs_lm_eval
def test_local_tasks_end_to_end(data, model, tasks_dir):
    found = evaluate_tasks(model, data.tokenizer, local_tasks(tasks_dir), OneRank())
    rows = [json.loads(line) for line in (tasks_dir / "rows.jsonl").read_text().splitlines()]
    right, matches = 0, 0
    encode = data.tokenizer.encode
    for row in rows:
        scores = []
        for choice in row["choices"]:
            context, whole = encode(row["question"]), encode(row["question"] + choice)
            scores.append(log_probability(model, context, whole[len(context) :])[0])
        right += scores.index(max(scores)) == row["label"]
        text = data.tokenizer.decode(
            generate(
                model, context, method="ar", max_new_tokens=10, eos_id=data.tokenizer.eos_id
            ).tokens
        )
        matches += text.split("o")[0] == row["choices"][0]
    assert found["results"]["local_choice"]["acc,none"] == right / 4
    assert found["results"]["local_answer"]["exact_match,none"] == matches / 4
    assert found["n_samples"]["local_choice"]["effective"] == 4
    assert list(found["decoders"]) == ["ar", "tidar", "tidar_diffusion"]
    for name, made in found["decoders"].items():
        cost = made["generation"]["local_answer"]
        assert made["generation"].keys() == made["results"].keys() == {"local_answer"}
        assert cost["answers"] == 4
        assert cost["tokens_per_forward"] == cost["tokens"] / cost["forwards"] >= 1.0
        assert cost["tokens_per_second"] == cost["tokens"] / cost["seconds"] > 0
        if name != "tidar_diffusion":  # that one may answer otherwise
            assert made["results"]["local_answer"]["exact_match,none"] == matches / 4
    assert found["decoders"]["ar"]["generation"]["local_answer"]["tokens_per_forward"] == 1.0
    json.dumps(found)


@needs_lm_eval
def test_two_ranks_say_what_one_says(data, two_ranks, tasks_dir):
    model = make_model(model_config(data.tokenizer))
    config = local_tasks(tasks_dir)
    one = evaluate_tasks(model, data.tokenizer, config, OneRank())
    assert without_clocks(two_ranks["tasks"]) == without_clocks(one)


def without_clocks(found: dict) -> dict:
    """Results without what differs from run to run."""
    found = json.loads(json.dumps(found))
    for made in found["decoders"].values():
        for cost in made["generation"].values():
            assert cost.pop("seconds") > 0
            assert cost.pop("tokens_per_second") > 0
    return found


@needs_lm_eval
def test_an_unknown_task_is_named(data, model, tasks_dir, monkeypatch):
    """Looked for among one's own first; the library's thousands take a while to list."""
    import lm_eval.tasks

    listed = []

    def manager(include_path, include_defaults=True):
        listed.append(include_defaults)
        return real(include_path=include_path, include_defaults=False)

    real = lm_eval.tasks.TaskManager
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)
    config = replace(CONFIG, tasks=["local_choice", "no_such_task"], tasks_dir=str(tasks_dir))
    with pytest.raises(UserError, match="no task named no_such_task"):
        evaluate_tasks(model, data.tokenizer, config, OneRank())
    assert listed == [False, True]


@needs_lm_eval
def test_data_that_cannot_be_had_is_named(data, model, tasks_dir, tmp_path):
    lost = (tasks_dir / "choice.yaml").read_text().replace("rows.jsonl", "gone.jsonl")
    (tmp_path / "lost.yaml").write_text(lost.replace("local_choice", "lost"))
    config = replace(CONFIG, tasks=["lost"], tasks_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"cannot be had .*gone\.jsonl"):
        evaluate_tasks(model, data.tokenizer, config, OneRank())


@pytest.fixture
def adapter(data, model):
    from pipeline.evals.lm_eval_model import TidarLM

    return TidarLM(model, data.tokenizer, CONFIG, Decoder("tidar", "tidar", 1.0), OneRank())


def requests(*arguments: tuple) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=args, task_name="t") for args in arguments]


@needs_lm_eval
def test_log_probabilities_are_those_of_single_forwards(data, model, adapter):
    """Batches of unlike lengths, an empty context, and one that is too long."""
    encode, eos = data.tokenizer.encode, data.tokenizer.eos_id
    long = "the quick brown fox " * 60 + "jumps"
    pairs = [("the quick", " brown"), ("", "lazy dogs"), ("été", " over 木漏れ日"), (long, " fox")]
    got = adapter.loglikelihood(requests(*pairs))
    for (context, target), (value, greedy) in zip(pairs, got, strict=True):
        ids = encode(context) or [eos]
        whole = encode(context + target) if context else [eos, *encode(target)]
        wanted = whole[len(ids) :]
        room = model.config.max_positions + 1 - len(wanted)
        expected = log_probability(model, whole[: len(ids)][-room:], wanted)
        assert value == pytest.approx(expected[0], rel=1e-4)
        assert greedy == expected[1]


@needs_lm_eval
def test_a_continuation_as_long_as_the_model_is_scored_and_a_longer_one_refused(
    data, model, adapter
):
    """Its rows would be those of the request beside it."""
    limit = model.config.max_positions
    ids = (data.tokenizer.encode("the quick brown fox ") * limit)[: limit + 2]
    beside = (None, ids[:3], ids[3:5])
    longest = (None, ids[:1], ids[1 : limit + 1])
    got = adapter._loglikelihood_tokens([beside, longest])
    for (_, context, target), (value, _) in zip((beside, longest), got, strict=True):
        assert value == pytest.approx(log_probability(model, context, target)[0], rel=1e-4)
    with pytest.raises(UserError, match=rf"tasks: .* {limit + 1} tokens, .* {limit} "):
        adapter._loglikelihood_tokens([beside, (None, ids[:1], ids[1:])])


@needs_lm_eval
def test_greedy_continuations_are_recognised(data, model, adapter):
    context = data.tokenizer.encode("the quick")
    greedy = generate(model, context, method="ar", max_new_tokens=4).tokens
    other = [*greedy[:-1], (greedy[-1] + 1) % data.tokenizer.vocab_size]
    pairs = [(None, context, greedy), (None, context, other)]
    assert [is_greedy for _, is_greedy in adapter._loglikelihood_tokens(pairs)] == [True, False]


@needs_lm_eval
def test_long_texts_score_every_token_once(data, model, adapter):
    text = "木漏れ日 jumps over " * 80
    ids, limit = data.tokenizer.encode(text), model.config.max_positions
    assert len(ids) > limit
    total = log_probability(model, [data.tokenizer.eos_id], ids[:limit])[0]
    for n in range(limit, len(ids), limit):
        end = min(n + limit, len(ids))
        # The last window keeps its full length of context.
        context = ids[end - limit - 1 : n]
        total += log_probability(model, context, ids[n:end])[0]
    got = adapter.loglikelihood_rolling(requests((text,)))
    assert got == [pytest.approx(total, rel=1e-4)]
    assert not math.isnan(got[0])


@needs_lm_eval
@pytest.mark.parametrize("method", ["ar", "tidar"])
def test_answers_end_before_the_stop_string(data, model, adapter, method):
    adapter.decoder = Decoder(method, method, 1.0)
    context = data.tokenizer.encode("lazy dogs")
    full = data.tokenizer.decode(generate(model, context, method="ar", max_new_tokens=12).tokens)
    stop = full[3:5]
    options = {"until": [stop], "do_sample": False}
    (answer,) = adapter.generate_until(requests(("lazy dogs", options)))
    assert answer == full.split(stop)[0]
    unlimited = adapter.generate_until(requests(("lazy dogs", {"until": []})))
    assert unlimited == [full.split(data.tokenizer.decode([data.tokenizer.eos_id]) or "\0")[0]]
    assert adapter.generated["t"].answers == 2


@needs_lm_eval
def test_options_that_the_decoder_lacks_are_refused(adapter):
    sampled = {"until": [], "do_sample": True, "temperature": 0.8}
    assert adapter._sampling({**sampled, "top_p": 1.0, "top_k": 0}).temperature == 0.8
    assert (
        adapter._sampling({"do_sample": False, "temperature": 0.0, "top_p": 0.9}).temperature == 0
    )
    drawn = adapter._sampling({**sampled, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1})
    assert (drawn.top_k, drawn.top_p, drawn.repetition_penalty) == (20, 0.9, 1.1)
    assert adapter._sampling({**sampled, "top_k": -1, "top_p": None}).top_k is None
    with pytest.raises(UserError, match=r"min_p=0\.1"):
        adapter._sampling({**sampled, "min_p": 0.1})
    with pytest.raises(UserError, match="may have 500 tokens"):
        adapter.generate_until(requests(("the", {"until": [], "max_gen_toks": 500})))


@needs_lm_eval
@pytest.mark.long
def test_the_published_tasks_are_known_by_name():
    from pipeline.evals.tasks import _task_manager

    names = [
        "mmlu", "arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande", "gsm8k",
        "minerva_math",
    ]  # fmt: skip
    manager = _task_manager(TasksConfig(tasks=names))
    assert sorted(manager.match_tasks(names)) == sorted(names)
