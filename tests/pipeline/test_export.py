"""Exports: what transformers loads computes the same, and nothing is lost on the way."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import commands
import huggingface_hub
import pytest
import tokenizers
import torch
from fake_hub import FakeHub
from safetensors.torch import load_file
from small_models import (
    SWITCHES,
    edit_json,
    huggingface_tokenizer,
    random_model,
    sentencepiece_tokenizer,
    small_config,
    write_checkpoint,
    write_huggingface,
    write_run,
)

from pipeline import export as command
from pipeline import load_model
from pipeline.checkpoint.files import write_file_list
from pipeline.decoding import generate
from pipeline.model import custom_generate, hf_export, hf_tokenizer
from pipeline.model.draft_record import Acceptance, DraftRecord
from pipeline.model.hf_export import OLDEST_TRANSFORMERS, write_export
from pipeline.model.loading import open_model, read_model
from pipeline.model.parameters import is_drafting
from tidar_common.errors import UserError

SAMPLE = "def add(left, right):\n    return left + right  # 加算 🙂 \u2581 é\n\n\ttail "


def export(path, output, dtype=None, **options):
    source = open_model(path)
    model = read_model(source, dtype=dtype, device="cpu")
    return write_export(model, source.tokenizer(), source, output, **options)


def assert_equal_weights(left, right) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype
        assert torch.equal(tensor, right[name]), name


@pytest.fixture
def run_dir(tmp_path):
    return write_run(tmp_path / "run", random_model(small_config()), sentencepiece_tokenizer())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", SWITCHES)
def test_transformers_computes_the_same(tmp_path, family, tied):
    from transformers import AutoModelForCausalLM

    config = small_config(family, tie_embeddings=tied)
    ours = random_model(config)
    write_checkpoint(tmp_path / "step", ours, sentencepiece_tokenizer())
    assert export(tmp_path / "step", tmp_path / "out") is None
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert theirs.config.model_type == family
    ids = torch.randint(330, (2, 150), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = ours(ids)
        torch.testing.assert_close(theirs(ids).logits, expected, atol=1e-4, rtol=0)
    assert theirs.generation_config.eos_token_id == sentencepiece_tokenizer().eos_id


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_round_trip_changes_no_bit(tmp_path, tied, precision):
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    model = random_model(small_config(tie_embeddings=tied)).to(dtype)
    write_checkpoint(tmp_path / "step", model, sentencepiece_tokenizer(), precision)
    export(tmp_path / "step", tmp_path / "out")
    again, tokenizer = load_model(tmp_path / "out", device="cpu")
    assert again.config == model.config
    assert_equal_weights(again.state_dict(), model.state_dict())
    assert tokenizer.content() == sentencepiece_tokenizer().content()
    assert load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].dtype == dtype


@pytest.mark.parametrize("tied", [False, True])
def test_what_only_drafts_goes_into_a_file_of_its_own(tmp_path, tied):
    """Other software loads the base model; this one all of it, and drafts as before."""
    from transformers import AutoModelForCausalLM

    model = random_model(
        small_config(tie_embeddings=tied, adapter_rank=3, adapter_targets=("up_proj", "q_proj"),
                     own_mask_embedding=True, draft_rank=2, draft_cell="mlp", draft_width=5)
    )  # fmt: skip
    step = write_checkpoint(tmp_path / "step", model, sentencepiece_tokenizer())
    export(step, tmp_path / "out")
    files = [
        set(load_file(tmp_path / "out" / f"{name}.safetensors")) for name in ("model", "tidar")
    ]
    assert files[1] == {name for name in model.state_dict() if is_drafting(name)}
    assert not files[0] & files[1]
    again, _ = load_model(tmp_path / "out", device="cpu")
    assert again.config == model.config
    assert_equal_weights(again.state_dict(), model.state_dict())
    texts = [generate(m, [9, 8, 7], max_new_tokens=20).tokens for m in (model, again)]
    assert texts[0] == texts[1]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    ids = torch.randint(330, (2, 50), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids), atol=1e-4, rtol=0)
    (tmp_path / "out" / "tidar.safetensors").unlink()
    with pytest.raises(UserError, match=r"tidar\.safetensors: missing, although tidar\.json asks"):
        load_model(tmp_path / "out")


@pytest.mark.parametrize("family", SWITCHES)
def test_a_hugging_face_folder_passes_through_unchanged(tmp_path, family):
    write_huggingface(tmp_path / "in", family, huggingface_tokenizer())
    export(tmp_path / "in", tmp_path / "out")
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("in", "out")]
    assert_equal_weights(*files)
    export(tmp_path / "out", tmp_path / "again")
    for name in ("model.safetensors", "config.json", "tidar.json", "tokenizer.json"):
        first, second = (tmp_path / folder / name for folder in ("out", "again"))
        assert first.read_bytes() == second.read_bytes(), name


def test_large_models_are_split_and_found_again(tmp_path, run_dir):
    export(run_dir, tmp_path / "out", shard_bytes=20_000)
    parts = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(parts) > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(parts)
    again, _ = load_model(tmp_path / "out", device="cpu")
    assert_equal_weights(again.state_dict(), load_model(run_dir, device="cpu")[0].state_dict())


def test_the_type_can_be_chosen(tmp_path, run_dir):
    export(run_dir, tmp_path / "out", dtype="bf16")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    model, _ = load_model(tmp_path / "out", device="cpu")
    expected, _ = load_model(run_dir, dtype="bf16", device="cpu")
    assert_equal_weights(model.state_dict(), expected.state_dict())


@pytest.mark.parametrize("kind", ["unigram", "bpe", "huggingface"])
def test_auto_tokenizer_gives_the_same_ids(tmp_path, kind):
    from transformers import AutoTokenizer

    ours = huggingface_tokenizer() if kind == "huggingface" else sentencepiece_tokenizer(kind)
    config = small_config("llama", mask_token_id=ours.mask_id)
    write_checkpoint(tmp_path / "step", random_model(config), ours)
    assert export(tmp_path / "step", tmp_path / "out") is None
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in (SAMPLE, *hf_tokenizer.SAMPLES, ""):
        ids = theirs(text).input_ids
        assert ids == ours.encode(text)
        assert theirs.decode(ids) == ours.decode(ids) == text
    spelled = "a</s><|endoftext|><mask><|mask|>b"
    assert theirs(spelled, split_special_tokens=True).input_ids == ours.encode(spelled)
    assert theirs.eos_token_id == ours.eos_id
    assert theirs.mask_token_id == ours.mask_id
    assert theirs.pad_token_id != ours.mask_id
    assert load_model(tmp_path / "out", device="cpu")[1].content() == ours.content()


def test_sentencepiece_models_of_others_convert_too():
    """With a dummy prefix, removed spaces, normalisation and pieces of their own."""
    import io

    import sentencepiece
    from small_models import TEXT

    from data_prep.tokenizers.load import SentencePieceTokenizer

    for model_type in ("unigram", "bpe"):
        content = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([line for text in TEXT for line in text.splitlines()]),
            model_writer=content, vocab_size=340, model_type=model_type, byte_fallback=True,
            control_symbols=["<mask>"], user_defined_symbols=["<tool>"], minloglevel=2,
        )  # fmt: skip
        tokenizer = SentencePieceTokenizer(content.getvalue(), "test")
        converted, names = hf_tokenizer.from_sentencepiece(content.getvalue())
        assert names == {"unk_token": "<unk>"}
        for text in ("hello  world ", "ﬁne  def add( x ):", "x<tool>y", "日本 🙂"):
            expected = tokenizer.encode(text)
            assert converted.encode(text, add_special_tokens=False).ids == expected, text
            assert converted.decode(expected) == tokenizer.decode(expected)


def test_a_tokenizer_that_differs_is_left_out(tmp_path, run_dir, monkeypatch):
    wrong = hf_tokenizer.from_sentencepiece(sentencepiece_tokenizer("bpe").content())
    monkeypatch.setattr(hf_tokenizer, "from_sentencepiece", lambda content: wrong)
    warning = export(run_dir, tmp_path / "out")
    assert warning is not None
    assert "tokenizer.json" in warning
    assert "\n" not in warning
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    _, tokenizer = load_model(tmp_path / "out", device="cpu")
    assert tokenizer.encode(SAMPLE) == sentencepiece_tokenizer().encode(SAMPLE)
    assert "AutoTokenizer" not in (tmp_path / "out" / "README.md").read_text()


def test_what_a_decoder_must_know_stands_in_tidar_json(tmp_path, run_dir):
    export(run_dir, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "tidar.json").read_text()) == {
        "format_version": 2,
        "mask_token_id": 4,
        "block_size": 3,
        "label_shift": {"clean": 1, "mask": 0},
        "drafting": {
            "draft_rank": 0,
            "draft_cell": "gru",
            "draft_width": None,
            "adapter_rank": 0,
            "adapter_targets": [],
            "own_mask_embedding": False,
            "causal_slots": False,
            "linear_drafts": False,
        },
        "tokenizer": {"kind": "sentencepiece", "file": "tokenizer.model", "eos_token_id": 3},
        "training": {"step": 7, "tokens": 1234},
        "acceptance": None,
    }
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\n")
    assert "| Block size | 3 |" in card
    assert "7 steps, 1,234 tokens" in card
    assert "- custom_generate\n" in card
    assert "Tokens expected" not in card  # nothing was measured


def test_the_card_shows_what_was_measured(tmp_path, run_dir):
    record = DraftRecord(sampled=Acceptance((0.5, 0.2)))
    source = replace(open_model(run_dir), draft_record=record)
    model = read_model(source, device="cpu")
    write_export(model, source.tokenizer(), source, tmp_path / "out", hub_id="owner/name")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| Tokens expected of a forward, temperature 1 | 1.60 on held-out text |" in card
    assert "a forward, greedy" not in card
    assert 'folder = "owner/name"\n' in card


def test_the_code_that_drafts_is_copied_as_it_is(tmp_path, run_dir):
    export(run_dir, tmp_path / "out")
    source, copy = Path(custom_generate.__file__).parent, tmp_path / "out" / "custom_generate"
    files = {path.name for path in source.glob("*.py")} - {"__init__.py"}
    assert {path.name for path in copy.iterdir()} == {*files, "requirements.txt"}
    for name in files:
        assert (copy / name).read_bytes() == (source / name).read_bytes()
    (requirement,) = (copy / "requirements.txt").read_text().split()
    assert requirement == f"transformers>={OLDEST_TRANSFORMERS}"


def test_the_autoregressive_twin_is_exported_as_such(tmp_path):
    config = small_config().without_drafting()
    write_checkpoint(tmp_path / "step", random_model(config), sentencepiece_tokenizer())
    export(tmp_path / "step", tmp_path / "out")
    tidar = json.loads((tmp_path / "out" / "tidar.json").read_text())
    assert tidar["mask_token_id"] is None
    assert tidar["block_size"] is None
    assert load_model(tmp_path / "out", device="cpu")[0].config == config
    card = (tmp_path / "out" / "README.md").read_text()
    assert "masked diffusion" not in card
    assert "custom_generate" not in card
    assert not (tmp_path / "out" / "custom_generate").exists()


def test_only_an_earlier_export_is_replaced_and_only_when_asked(tmp_path, run_dir):
    output = tmp_path / "out"
    output.mkdir()
    export(run_dir, output)  # an empty folder is not in the way
    with pytest.raises(UserError, match="overwrite=true"):
        export(run_dir, output)
    (output / "stray").touch()
    export(run_dir, output, overwrite=True)
    assert not (output / "stray").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").touch()
    (tmp_path / "file").touch()
    for path in (other, tmp_path / "file"):
        with pytest.raises(UserError, match=r"output: .*give the name of a new folder"):
            export(run_dir, path, overwrite=True)
    assert (other / "thesis.txt").exists()


def test_a_failed_export_leaves_nothing_and_keeps_the_old_one(tmp_path, run_dir, monkeypatch):
    output = tmp_path / "exports" / "out"
    export(run_dir, output)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf_export, "write_weights", full)
    for target in (output, output.with_name("new")):
        with pytest.raises(UserError, match=r"output: .*No space left"):
            export(run_dir, target, overwrite=True)
    after = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert after == before
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_an_export_of_the_former_format_is_read(tmp_path, run_dir):
    export(run_dir, tmp_path / "out")
    path = tmp_path / "out" / "tidar.json"
    values = json.loads(path.read_text())
    del values["drafting"]
    path.write_text(json.dumps({**values, "format_version": 1}))
    ours, theirs = (load_model(p, device="cpu")[0] for p in (run_dir, tmp_path / "out"))
    assert ours.config == theirs.config
    assert_equal_weights(ours.state_dict(), theirs.state_dict())
    edit_json(path, format_version=3)
    with pytest.raises(UserError, match="format version 3, this release reads 1 to 2"):
        load_model(tmp_path / "out")


def test_shapes_that_no_class_of_theirs_has(tmp_path):
    config = small_config(qkv_bias=True, qk_norm=True)
    write_checkpoint(tmp_path / "step", random_model(config), sentencepiece_tokenizer())
    with pytest.raises(UserError, match="qkv_bias and qk_norm"):
        export(tmp_path / "step", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_exports_a_trained_run(tmp_path, trained_run):
    from transformers import AutoModelForCausalLM

    output = tmp_path / "out"
    done = commands.run("pipeline.export", f"checkpoint={trained_run}", f"output={output}")
    assert done.returncode == 0, done.stderr
    assert "qwen3 architecture" in done.stdout
    ours, _ = load_model(trained_run, device="cpu")
    theirs = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    ids = torch.arange(60)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), "output: {output} holds an export; overwrite=true replaces it"),
        (("overwrite=true", "dtype=fp8"), "dtype: unknown value 'fp8'"),
        (("checkpoint=/nowhere",), "checkpoint: /nowhere does not exist"),
        (("checkpoint=???",), "checkpoint: has no value"),
        (("output=???",), "output: has no value"),
        (("overwrite=true", "push_to=name"), "push_to: 'name' is no id"),
    ],
)
def test_mistakes_are_one_line(tmp_path, run_dir, monkeypatch, capsys, overrides, message):
    output = tmp_path / "out"
    export(run_dir, output)
    arguments = [f"checkpoint={run_dir}", f"output={output}", *overrides]
    monkeypatch.setattr(sys, "argv", ["tidar-export", *arguments])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: " + message.format(output=output))
    assert err.count("\n") == 1


def test_the_command_pushes_what_it_wrote(tmp_path, run_dir, monkeypatch, capsys):
    hub = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    output = tmp_path / "out"
    arguments = [f"checkpoint={run_dir}", f"output={output}", "push_to=owner/name"]
    monkeypatch.setattr(sys, "argv", ["tidar-export", *arguments])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 0
    assert capsys.readouterr().out.endswith("https://huggingface.co/owner/name (private)\n")
    pushed, written = (
        {path.relative_to(top): path.read_bytes() for path in top.rglob("*") if path.is_file()}
        for top in (hub.folder / "owner" / "name", output)
    )
    assert pushed == written
    assert 'folder = "owner/name"' in (output / "README.md").read_text()


def test_a_checkpoint_names_its_own_end_token(tmp_path):
    """A tokenizer whose end token has no usual name says so beside itself."""
    folder = write_checkpoint(
        tmp_path / "step", random_model(small_config()), huggingface_tokenizer()
    )
    path = folder / "tokenizer.json"
    model = tokenizers.Tokenizer.from_file(str(path))
    model.add_special_tokens(["<|stop|>"])
    model.save(str(path))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|stop|>"}))
    write_file_list(folder)
    export(folder, tmp_path / "out")
    for path in (folder, tmp_path / "out"):
        _, tokenizer = load_model(path, device="cpu")
        assert tokenizer.eos_id == model.token_to_id("<|stop|>")
