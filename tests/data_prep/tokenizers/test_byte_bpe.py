"""tiktoken over the merges of a `tokenizer.json`: the same ids, or not used."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

pytest.importorskip("tiktoken")

from data_prep.formats.manifest import Manifest
from data_prep.stages.plan import fastest_encoder
from data_prep.tokenizers.byte_bpe import byte_bpe
from data_prep.tokenizers.load import HuggingFaceTokenizer

QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA = QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)


def trained(family, texts):
    """A byte-level BPE with the normalizer and pre-tokenizer of a family of models."""
    model = tokenizers.Tokenizer(models.BPE(ignore_merges=family == "llama3"))
    if family == "gpt2":
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        pattern = Regex(QWEN if family == "qwen2.5" else LLAMA)
        model.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(pattern, "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    if family == "qwen2.5":
        model.normalizer = normalizers.NFC()
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=3000,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    model.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    return model


@pytest.fixture(scope="module", params=["qwen2.5", "llama3", "gpt2"])
def loaded(request, mixed):
    # Scripts among the text, so that merges of more than ASCII are compared.
    return HuggingFaceTokenizer(
        trained(request.param, mixed[:30] + mixed[60:120]).to_str().encode(), request.param
    )


def test_ids_are_those_of_the_file_on_all_kinds_of_text(loaded, mixed):
    assert loaded.encoders == ("tiktoken", "batch", "plain")
    odd = ["a <tool_call> b", "<|endoftext|><|mask|>", " " * 3000, "e\u0301 \u212b", "한글", "\0"]
    for ids, text in zip(
        loaded.encode_batch([*mixed, *odd], "tiktoken"), [*mixed, *odd], strict=True
    ):
        assert ids.dtype == np.int32
        assert ids.tolist() == loaded.encode(text)


def test_what_it_cannot_do_is_left_to_others(loaded):
    encoding = byte_bpe(loaded.content())
    assert encoding is not None
    assert encoding.encode("a <tool_call> b") is None
    assert encoding.encode(" " * 1_000_000) is None
    assert encoding.encode("<|endoftext|>") is not None


def change(spec, keys, value):
    for key in keys[:-1]:
        spec = spec[key]
    spec[keys[-1]] = value


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("normalizer",), {"type": "NFKC"}),
        (("pre_tokenizer",), None),
        (("pre_tokenizer", "add_prefix_space"), True),
        (("pre_tokenizer",), {"type": "Whitespace"}),
        (("model", "byte_fallback"), True),
        (("model", "dropout"), 0.5),
        (("model", "type"), "WordPiece"),
        (("model", "vocab"), {"a": 0}),
    ],
)
def test_other_kinds_of_files_have_no_such_encoder(texts, keys, value):
    spec = json.loads(trained("gpt2", texts[:5]).to_str())
    assert byte_bpe(json.dumps(spec).encode()) is not None
    change(spec, keys, value)
    assert byte_bpe(json.dumps(spec).encode()) is None


def joined_otherwise():
    """A file whose pairs tiktoken does not follow: it joins `a` and `bc`, which are no pair."""
    vocab = {sign: n for n, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for token in ("bc", "ab", "abc", "<|endoftext|>"):
        vocab[token] = len(vocab)
    merges = [("b", "c"), ("a", "b"), ("ab", "c")]
    model = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return HuggingFaceTokenizer(model.to_str().encode(), "odd")


def test_one_that_gives_other_ids_is_not_used(corpus_of, tmp_path, capsys):
    tokenizer = joined_otherwise()
    assert tokenizer.encoders[0] == "tiktoken"
    corpus, tasks = corpus_of(tmp_path, ["abc abc", "nothing"])
    assert fastest_encoder(tokenizer, corpus, tasks) == "batch"
    said = capsys.readouterr().out
    assert said == "encoder tiktoken: other ids on 1 of 2 documents, so it is not used\n"


def test_a_preparation_with_workers_uses_it(overrides, command, texts, tmp_path):
    path = tmp_path / "tokenizer.json"
    trained("qwen2.5", texts[:20]).save(str(path))
    given = [one for one in overrides if not one.startswith("tokenizer.")]
    given += ["tokenizer=huggingface", f"tokenizer.path={path}"]
    result = command(*given, "workers=2", f"output_dir={tmp_path / 'data'}")
    assert result.code == 0, result.err
    assert Manifest.load(tmp_path / "data").encoder == "tiktoken"
    assert command("verify=true", f"output_dir={tmp_path / 'data'}").code == 0
