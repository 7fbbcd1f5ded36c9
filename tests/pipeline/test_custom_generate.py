"""Drafting in transformers, by the code that an export carries: the text of plain `generate`, in
the forwards that this project's decoder takes. Where the vectors for other decoders cover a case,
they say what is expected."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from scipy.stats import binomtest, chisquare
from small_models import edit_json, huggingface_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

from pipeline.decoding import generate as decode
from pipeline.model.custom_generate.drafting import Drafting, Head
from pipeline.model.custom_generate.generate import Request, generate
from pipeline.model.hf_export import write_custom_generate, write_export
from pipeline.model.loading import load_into, open_model
from pipeline.model.transformers_backbone import empty_model

DATA = Path(__file__).parents[1] / "data"
HEADS = ("gru", "causal", "one_block")
ALONE = """
import importlib.util, json, sys
sys.path += sys.argv[3:]
assert not [name for name in ("pipeline", "tidar_common") if importlib.util.find_spec(name)]
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
results = []
for case in json.load(open(sys.argv[1])):
    folder, new = case["folder"], {"max_new_tokens": case["tokens"], "eos_token_id": None}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if "text" in case:
        inputs = AutoTokenizer.from_pretrained(folder)(case["text"], return_tensors="pt")
    else:
        ids = torch.tensor([case["prompt"]])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    stats = {}
    drafted = model.generate(
        **inputs, **new, blocks=case["blocks"], stats=stats,
        custom_generate=folder, trust_remote_code=True,
    )
    plain = model.generate(**inputs, **new)
    if not results:  # a model that is trusted from the start generates so by itself
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        assert torch.equal(model.generate(**inputs, **new, blocks=case["blocks"]), plain)
    length = inputs["input_ids"].shape[1]
    same = torch.equal(drafted, plain)
    results.append({**stats, "ids": drafted[0, length:].tolist(), "same": same})
json.dump(results, open(sys.argv[2], "w"))
"""


def carrying(folder: Path, source: Path, **changes) -> Path:
    """A copy of the export `source` that carries what drafts it, with `changes` of tidar.json."""
    shutil.copytree(source, folder)
    write_custom_generate(folder)
    edit_json(folder / "tidar.json", **changes)
    return folder


def runs_of(name: str) -> list[dict]:
    """The greedy runs of a vector's folder, without settings of their own."""
    runs = json.loads((DATA / "drafting" / name / "vectors.json").read_text())
    return [run for run in runs if not run["sampling"] and run["block_size"] == 4]


def loaded(folder: Path, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Trained exports with a head of each kind, and one without."""
    top = tmp_path_factory.mktemp("exports")
    sources = {name: DATA / "drafting" / name for name in HEADS}
    sources["headless"] = DATA / "decoding" / "model"
    return {name: carrying(top / name, source) for name, source in sources.items()}


@pytest.fixture(scope="module")
def models(folders):
    return {name: loaded(folder) for name, folder in folders.items()}


def prompt_of(name: str) -> dict[str, torch.Tensor]:
    prompt = [5, 6, 7, 8] if name == "headless" else runs_of(name)[0]["prompt"]
    ids = torch.tensor([prompt])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def both(model, inputs, **options):
    """Plain, drafted with all blocks, and the figures of the latter."""
    stats: dict = {}
    plain = model.generate(**inputs, **options)
    drafted = generate(**inputs, **options, model=model, blocks="all", stats=stats)
    return plain, drafted, stats


# --- alone ---


def test_it_drafts_without_this_project(folders, tmp_path):
    """In a process that cannot import it, as a folder and as an id in the hub's cache."""
    cases, expected = [], []
    for name in HEADS:
        for run in runs_of(name):
            steps = [step["made"] for step in run["steps"]]
            tokens = [run["first"], *(token for made in steps for token in made)]
            case = {key: run[key] for key in ("prompt", "blocks")}
            cases.append({**case, "folder": str(folders[name]), "tokens": len(tokens)})
            expected.append((tokens, list(map(len, steps)), 1 + len(steps)))
    vectors = json.loads((DATA / "decoding" / "vectors.json").read_text())["greedy"]
    for run in vectors[0]["steps"]:
        size = run["block_size"]
        folder = carrying(tmp_path / f"{size}-{len(run['blocks'])}", DATA / "decoding" / "model",
                          block_size=size)  # fmt: skip
        cases.append({"text": vectors[0]["prompt"], "blocks": run["blocks"], "folder": str(folder),
                      "tokens": len(vectors[0]["tokens"])})  # fmt: skip
        expected.append((vectors[0]["tokens"], run["accepted"], run["forwards"]))
    snapshot = tmp_path / "hf" / "hub" / "models--owner--name" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(folders["gru"], snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    cases.append({**cases[0], "folder": "owner/name"})
    expected.append(expected[0])

    (tmp_path / "cases").write_text(json.dumps(cases))
    paths = [sysconfig.get_paths()[key] for key in ("purelib", "platlib")]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        # Isolated, and without the site module: it would follow the files that lead here.
        [sys.executable, "-I", "-S", "-c", ALONE, tmp_path / "cases", tmp_path / "out", *paths],
        env=environment, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for case, result, (tokens, accepted, forwards) in zip(
        cases, json.loads((tmp_path / "out").read_text()), expected, strict=True
    ):
        assert result["same"], case
        assert result["ids"] == tokens
        assert result["forwards"] == forwards
        # A decoder counts what its last step made, also behind the limit.
        assert result["accepted"][:-1] == accepted[:-1]
        assert result["accepted"][-1] <= accepted[-1]
        assert result["tokens_per_forward"] == len(tokens) / forwards


# --- text ---


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [*HEADS, "headless"])
@pytest.mark.parametrize("blocks", ["all", "none", None, [1]])
def test_greedy_text_is_that_of_plain_generate(folders, name, blocks, attention):
    model = loaded(folders[name], attn_implementation=attention)
    inputs = prompt_of(name)
    options = {"max_new_tokens": 40, "repetition_penalty": 1.2, "min_new_tokens": 30}
    plain = model.generate(**inputs, **options)
    stats: dict = {}
    drafted = generate(**inputs, **options, model=model, blocks=blocks, stats=stats)
    assert torch.equal(plain, drafted)
    assert stats["tokens"] == plain.shape[1] - inputs["input_ids"].shape[1]
    assert sum(stats["accepted"]) == stats["tokens"] - 1
    assert stats["tokens_per_forward"] > 1.2 or (name == "headless" and blocks == "none")


@pytest.mark.parametrize("name", ["gru", "headless"])
def test_a_long_prompt_is_read_in_pieces(models, name):
    """As many as `prefill_chunk_size` asks for; the text does not depend on it."""
    model, inputs = models[name], prompt_of(name)
    ids = inputs["input_ids"].repeat(1, 6)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    plain, whole, stats = both(model, inputs, max_new_tokens=20)
    _, cut, more = both(model, inputs, max_new_tokens=20, prefill_chunk_size=5)
    assert torch.equal(plain, whole)
    assert torch.equal(plain, cut)
    assert more["forwards"] - stats["forwards"] == -(-ids.shape[1] // 5) - 1


def next_tokens(model, inputs, settings: dict, count: int) -> dict[tuple[int, ...], float]:
    """The chances of all texts of `count` new tokens under plain sampling."""
    chances: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(count):
        longer = {}
        for text, chance in chances.items():
            ids = torch.cat([inputs["input_ids"], torch.tensor([text], dtype=torch.int64)], dim=1)
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=1,
                return_dict_in_generate=True, output_scores=True, **settings,
            )  # fmt: skip
            for token, share in enumerate(out.scores[0][0].softmax(-1).tolist()):
                if share > 0:
                    longer[(*text, token)] = chance * share
        chances = longer
    return chances


def drawn_p_value(model, name: str, settings: dict, draws: int, blocks="all") -> float:
    """Of `draws` drafted texts of three tokens, against their chances."""
    inputs = prompt_of(name)
    chances = next_tokens(model, inputs, settings, 3)
    counts = dict.fromkeys(chances, 0)
    torch.manual_seed(1)
    for _ in range(draws):
        out = generate(**inputs, **settings, model=model, blocks=blocks, do_sample=True,
                       max_new_tokens=3)  # fmt: skip
        counts[tuple(out[0, inputs["input_ids"].shape[1] :].tolist())] += 1
    order = sorted(chances, key=lambda text: chances[text])
    observed, expected = [0.0], [0.0]
    for text in order:  # rare texts in one bin, until it is large enough
        if expected[-1] >= 5:
            observed.append(0.0)
            expected.append(0.0)
        observed[-1] += counts[text]
        expected[-1] += draws * chances[text]
    if expected[-1] < 5:
        last, rest = observed.pop(), expected.pop()
        observed[-1] += last
        expected[-1] += rest
    assert len(expected) > 6
    return float(chisquare(observed, expected, sum_check=False).pvalue)


SETTINGS = [
    ("gru", {"temperature": 1.0, "top_k": 6}), ("one_block", {"temperature": 3.0, "top_p": 0.6}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_drawn_text_has_the_distribution_of_plain_sampling(models, name, settings):
    assert drawn_p_value(models[name], name, settings, 250) > 1e-3


@pytest.mark.long
@pytest.mark.parametrize("blocks", ["all", "none"])
@pytest.mark.parametrize(("name", "settings"), [*SETTINGS, ("causal", {"top_k": 9})])
def test_so_it_has_in_many_draws(models, name, settings, blocks):
    assert drawn_p_value(models[name], name, settings, 6000, blocks) > 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_a_token_is_drawn_from_the_target_whatever_drafted_it(seed):
    """Some tokens the draft never gives, some the target never takes."""
    torch.manual_seed(seed)
    p, q = torch.rand(2, 7).pow(2)
    p[0] = q[1] = q[2] = 0
    p, q, draws = p / p.sum(), q / q.sum(), 4000
    counts, kept = torch.zeros(7), 0
    for draft in torch.multinomial(q, draws, replacement=True):
        hand = SimpleNamespace(greedy=False, drafts=[draft[None]], draft_chances=[q])
        token, accepted = Request._choose(hand, p.log(), 0)
        counts[token] += 1
        kept += accepted
    assert counts[0] == 0
    assert chisquare(counts[1:].double(), (p[1:] * draws).double(), sum_check=False).pvalue > 1e-3
    assert binomtest(kept, draws, float(torch.minimum(p, q).sum())).pvalue > 1e-3


# --- what generate gives and takes ---


def test_a_text_ends_inside_a_block(models):
    """At an end token, at a stop string and at the limit, wherever in a step these are."""
    model, inputs = models["gru"], prompt_of("gru")
    text = model.generate(**inputs, max_new_tokens=24)[0, inputs["input_ids"].shape[1] :].tolist()
    ends = [position for position in range(1, 24) if text.index(text[position]) == position]
    assert len(ends) > 4
    for position in ends:
        plain, drafted, stats = both(
            model, inputs, max_new_tokens=24, eos_token_id=[text[position], 0]
        )
        assert torch.equal(plain, drafted)
        assert stats["tokens"] <= position + 1
    for limit in range(1, 12):
        plain, drafted, stats = both(model, inputs, max_new_tokens=limit)
        assert torch.equal(plain, drafted)
        assert stats["tokens"] == limit


def test_stop_strings(models, folders):
    model, tokenizer = models["headless"], AutoTokenizer.from_pretrained(folders["headless"])
    inputs = tokenizer("def add(left", return_tensors="pt")
    options = {"max_new_tokens": 40, "stop_strings": ["return left"], "tokenizer": tokenizer}
    plain, drafted, _ = both(model, inputs, **options)
    assert torch.equal(plain, drafted)
    assert tokenizer.decode(drafted[0]).endswith("return left")


class Pieces(BaseStreamer):
    def __init__(self, fails: bool = False):
        self.pieces, self.ended, self.fails = [], False, fails

    def put(self, value):
        if self.fails and len(self.pieces) == 3:
            raise RuntimeError("the reader went away")
        self.pieces.append(value.flatten().tolist())

    def end(self):
        self.ended = True


@pytest.mark.parametrize("name", HEADS)
def test_a_streamer_gets_every_token_once(models, name):
    streamer = Pieces()
    out = generate(**prompt_of(name), model=models[name], max_new_tokens=30, streamer=streamer)
    assert [token for piece in streamer.pieces for token in piece] == out[0].tolist()
    assert streamer.ended
    assert max(map(len, streamer.pieces[1:])) > 1


def test_the_model_is_left_as_it_was(models):
    """Also when generation ends with an error."""
    model, inputs = models["gru"], prompt_of("gru")
    with torch.no_grad():
        before = model(**inputs).logits
    generate(**inputs, model=model, max_new_tokens=8)
    with pytest.raises(RuntimeError, match="went away"):
        generate(**inputs, model=model, max_new_tokens=30, streamer=Pieces(fails=True))
    assert not [name for name, module in model.named_modules() if module._forward_hooks]
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)


def cached(out):
    return out.cache if hasattr(out, "cache") else out.past_key_values


@pytest.mark.parametrize("name", [*HEADS, "headless"])
def test_output_scores_and_cache_are_those_of_plain_generate(models, name):
    """What is kept of the cache is the text alone, so it may be continued."""
    model, inputs = models[name], prompt_of(name)
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    plain, drafted, _ = both(model, inputs, max_new_tokens=23, temperature=0.7, **options)
    assert torch.equal(plain.sequences, drafted.sequences)
    for kind in ("scores", "logits"):
        rows = torch.stack([*plain[kind]]), torch.stack([*drafted[kind]])
        torch.testing.assert_close(*rows, atol=1e-4, rtol=1e-4)
    assert cached(drafted).get_seq_length() == plain.sequences.shape[1] - 1
    for ours, theirs in zip(cached(drafted).layers, cached(plain).layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours.values, theirs.values, atol=1e-4, rtol=1e-4)
    ids = drafted.sequences
    more = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 9}
    whole = model.generate(**more)
    assert torch.equal(generate(**more, model=model, past_key_values=cached(drafted)), whole)


def test_blocks_follow_the_acceptance_and_the_device():
    values = {"mask_token_id": 3, "block_size": 8, "drafting": {"draft_rank": 1}}
    tensors = {"draft_head.no_slot": torch.zeros(2)}
    every = tuple(range(1, 9))
    much = {"greedy": {"block": [0.8] * 7, "alone": [0.7] * 7}}
    little = {"greedy": {"block": [0.71] * 7, "alone": [0.7] * 7}}
    for acceptance, cpu, gpu in ((much, (), every), (little, (), ()), (None, every, every)):
        drafting = Drafting({**values, "acceptance": acceptance}, tensors)
        assert drafting.choose(None, True, "cpu") == cpu
        assert drafting.choose(None, True, "cuda") == gpu
    assert drafting.choose([3, 1, 3], True, "cpu") == (1, 3)
    with pytest.raises(ValueError, match="lstm"):
        Head({"no_slot": torch.zeros(2)}, "lstm")


# --- families that transformers alone runs ---


FAMILIES = {
    "Gemma3Text": {"sliding_window": 24, "query_pre_attn_scalar": 20, "num_key_value_heads": 2,
                   "head_dim": 8},
    "Mistral": {"sliding_window": 24, "num_key_value_heads": 2, "head_dim": 8},
    "Granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "num_key_value_heads": 2},
    "GPTNeoX": {"tie_word_embeddings": False},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hosted_family_drafts(tmp_path, family):
    """As this project's decoder does while the text is within the window, and as plain generate
    behind it, too."""
    config = getattr(transformers, f"{family}Config")(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=128, pad_token_id=0, bos_token_id=0,
        eos_token_id=0, **FAMILIES[family],
    )  # fmt: skip
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    huggingface_tokenizer().save(tmp_path / "base")
    source = open_model(tmp_path / "base", backbone="transformers")
    rank = {} if family == "GPTNeoX" else {"adapter_rank": 2, "adapter_targets": ("o_proj",)}
    ours = empty_model(
        replace(source.config, vocab_size=301, mask_token_id=300, block_size=3, draft_rank=2,
                own_mask_embedding=True, **rank),
        torch.device("cpu"), torch.float32,
    ).eval()  # fmt: skip
    load_into(ours, source)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    write_export(ours, huggingface_tokenizer(), source, tmp_path / "export")
    model, ids = loaded(tmp_path / "export"), torch.randint(300, (1, 6))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "eos_token_id": None}
    plain, drafted, stats = both(model, inputs, max_new_tokens=60)
    assert torch.equal(plain, drafted)
    expected = decode(ours, ids[0].tolist(), blocks=[1, 2, 3], max_new_tokens=16)
    assert drafted[0, 6:22].tolist() == expected.tokens
    whole = len(expected.accepted) - 1
    assert stats["accepted"][:whole] == expected.accepted[:whole]


# --- refusals ---


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_return_sequences": 3, "do_sample": True}, "one prompt, got 3; loop over them"),
        ({"num_beams": 2}, "beam_search: drafting does greedy search and sampling only"),
        ({"attention_mask": torch.tensor([[0, 1, 1]])}, "attention_mask: .*no padding"),
        ({"blocks": [9]}, r"blocks: \[9\] is not"), ({"blocks": "some"}, "blocks: 'some' is not"),
        ({"stop_strings": ["x"]}, "stop_strings: need tokenizer"),
        ({"guidance_scale": 2.0}, "guidance_scale: is not supported"),
        ({"synced_gpus": True}, "synced_gpus: is not supported"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions: is not"),
        ({"drafting": str(DATA)}, "has no tidar.json; name the folder"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_line(models, options, says):
    inputs = {"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.ones(1, 3)}
    with pytest.raises(ValueError, match=says) as caught:
        generate(model=models["gru"], **{**inputs, "max_new_tokens": 4, **options})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"format_version": 3},
            r"tidar\.json: format_version 3, this custom_generate reads 1 to 2",
        ),
        ({"drafting": {"draft_tree": 1}}, "drafting has the unknown key draft_tree"),
        ({"mask_token_id": None}, "has no mask token"),
    ],
)
def test_a_folder_that_it_cannot_read(tmp_path, models, folders, changes, says):
    folder = carrying(tmp_path / "copy", DATA / "drafting" / "gru", **changes)
    with pytest.raises(ValueError, match=says):
        generate(**prompt_of("gru"), model=models["gru"], drafting=str(folder))
    (folders["gru"] / "tidar.safetensors").rename(tmp_path / "away")
    try:
        with pytest.raises(ValueError, match=r"has no tidar\.safetensors"):
            generate(**prompt_of("gru"), model=loaded(folders["gru"]))
    finally:
        (tmp_path / "away").rename(folders["gru"] / "tidar.safetensors")


def test_a_model_that_cannot_take_a_mask_of_its_own(folders):
    model = loaded(folders["gru"])
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match=r"flash_attention_2 takes no mask.*'sdpa'"):
        generate(**prompt_of("gru"), model=model, max_new_tokens=3)
    other = transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=30, hidden_size=16, n_layer=1, n_head=2)
    )
    with pytest.raises(ValueError, match="bloom: drafting is not supported for this family"):
        generate(**prompt_of("gru"), model=other, max_new_tokens=3)
